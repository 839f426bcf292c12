"""The command line: a folder for each group of verbs, one file a verb; each parses, calls the library, saves and says.

Knows the whole library, which knows nothing of it. What verbs are made with lies here: options that several share and
texts as values (options, parsing), verbs from dataclasses (verbs), a folder's defaults (folder_file), what is printed
and saved (terminal, outputs), and what surrounds every verb (program, streams).
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.cli.program import check as check
    from lora_lab.cli.program import main as main
    from lora_lab.cli.program import script as script

__getattr__, __dir__, __all__ = face(__name__, {"program": ("check", "main", "script")})
