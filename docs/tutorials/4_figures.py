# %% [markdown]
# # From results to the figures of a paper
#
# Every command leaves its numbers in a JSON file with all that they hang on: versions, hashes of the inputs, the
# command. Figures and tables are drawn from that file alone, also years later. This page makes a result, a table for
# LaTeX, and a figure, and then changes the figure.

# %%
import matplotlib.pyplot as plt

import lora_lab as ll
from lora_lab import plots

adapter = ll.train("digits/relabel", method="coto", seed=0, steps=100, progress=False)
result = ll.shapley(adapter, samples=20, progress=False)

# %% [markdown]
# `result.rows()` are dictionaries, `result.frame()` is a DataFrame, and `lora-lab schema shapley` explains every
# column.

# %%
for row in result.rows():
    print(f"{row['player']:4} {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
print(result.to_latex())

# %% [markdown]
# A figure at the final width of one column, with type that is 7 points when printed. PDF fonts are TrueType, which
# conferences ask for.

# %%
ll.figure(result, width="single").savefig("shapley.pdf")

# %% [markdown]
# Beside other panels of your own, draw on Axes of your own.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(6.75, 2.2), layout="constrained")
plots.draw(result, "shapley:bars", ax=left)
right.hist([row["value"] for row in result.rows()])
right.set_xlabel("Shapley value")
figure.savefig("both.pdf")
plt.close(figure)
