# %% [markdown]
# # Two adapters and the line between them
#
# Two people fine-tune one base model on one task. Their adapters are equally good. Is everything between them good,
# too? If so, they can be averaged. This page trains two adapters, walks from one to the other, and finds out what a
# dip on the way is made of.
#
# A LoRA adapter adds a small matrix to a large one: W becomes W + ΔW with ΔW = s·B·A. B and A are its *factors*; s is
# a fixed number.

# %%
import lora_lab as ll

digits = ll.task("digits/relabel")
first, second = (ll.train(digits, method="lora", seed=seed, steps=150, progress=False) for seed in (0, 1))
for row in ll.evaluate([first, second], digits, progress=False).rows():
    print(f"{row['adapter']:18} {row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]")

# %% [markdown]
# `digits/relabel` is small: 8 × 8 pixels, and a base model that comes with the package. `evaluate` shows the adapters
# and the base alone, each with a 95 % interval over the test images: how far the accuracy could be off because only
# 500 images were looked at. The base alone is near chance, since the task has given every digit a new name.
#
# Now the line. At t = 0 is the first adapter, at t = 1 the second;
# ‖ΔW‖ is the size (norm) of all that is added. There is more than one way from one to the other:
#
# * **factors**: A and B are averaged. It is what papers on merging seeds often draw.
# * **delta**: ΔW is averaged. Averaging the factors adds products of one adapter's B with the other's A; here are none.
# * **matched**: like factors, but rescaled to the norm that ΔW has at the ends. It comes along with factors.

# %%
line = ll.interpolate([first, second], digits, points=5, progress=False)
for row in line.rows(t=0.5):
    print(f"{row['space']:8} accuracy {row['accuracy']:.3f}, ‖ΔW‖ {row['norm']:.1f}")

# %% [markdown]
# Halfway, averaging the factors loses much of the norm of ΔW. Two adapters that began from different random A have
# factors that point in different directions, so that (B₁ + B₂)(A₁ + A₂)/4 is small. Compare the three rows: where the
# norm is kept, or ΔW itself is averaged, little or nothing is lost.
#
# A *barrier* says how much worse it gets on the way than at the ends. There are several definitions, all in
# `line.summary`; "entezari" measures from the straight line between the two ends' values.

# %%
for row in line.summary["barriers"]:
    if row["metric"] != "loss" and row["barrier"] == "entezari":
        print(f"{row['space']:8} barrier {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")

# %% [markdown]
# The part of the barrier that goes away when the norm is kept was shrinkage, and not a ridge in the loss. The figure
# shows both: accuracy on the left, ‖ΔW‖ on the right.

# %%
ll.figure(line, width="single").savefig("line.pdf")
