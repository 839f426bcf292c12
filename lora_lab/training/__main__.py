"""`lora-lab train` for torchrun: torchrun --nproc-per-node 2 -m lora_lab.training --method coto …"""

import sys
from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="lora-lab")
command.load()(["train", *sys.argv[1:]])
