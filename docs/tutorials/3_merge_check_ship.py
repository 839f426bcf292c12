# %% [markdown]
# # Merge, check and ship
#
# Adapters of several tasks are to become one, which a server will load. Three things can go wrong without anyone
# noticing: a task is lost in the merge, the file means something else to the server than to you, or the server does
# not apply it at all. This page checks each.

# %%
import lora_lab as ll

names = ("identity", "mod3")
adapters = [ll.train(f"digits/{name}", method="lora", seed=0, steps=100, progress=False) for name in names]

# %% [markdown]
# ## Which method?
#
# An adapter adds ΔW = BA to a weight matrix; its *rank* is the number of columns of B. `compare_merges` puts every
# method on every adapter's own task, all at one rank, so that none is ahead because its file is larger. The number that
# the merged ΔW is multiplied by (`coefficient`) is chosen on validation data; the table is of test data.

# %%
table = ll.compare_merges(adapters, methods=["task-arithmetic", "ties", "tsv"], coefficients=[0.5, 1.0], progress=False)
for row in table.summary["by_method"]:
    print(f"{row['merge']:18} keeps {row['normalised']:.3f} of each adapter's score")

# %% [markdown]
# `alone` is each task's own adapter, `base` none at all, and the ensemble runs both adapters and averages their logits.
# With one set of adapters, many differences cannot be told from chance; the column `verdict` says so.
#
# ## The merge
#
# Its record tells the error of the cut to the rank, and the recipe that makes it again.

# %%
merged = ll.merge(adapters, method="task-arithmetic", coefficient=0.5, rank=8)
merged.save("merged", force=True)
print({key: merged.record["merge"][key] for key in ("method", "coefficient", "rank")})

# %% [markdown]
# ## Check
#
# What is read back is what was made: the norm of ΔW, module by module. `inspect` tells of a file without a model what
# is in it, and what is odd.

# %%
back = ll.load("merged")
for name, update in back.updates.items():
    assert abs(update.norm() - merged.updates[name].norm()) < 1e-4 * merged.updates[name].norm()
print(len(back.updates), "modules, rank", max(update.rank for update in back.updates.values()))

# %% [markdown]
# ## Ship
#
# A server may want another format. What is written has the same ΔW. In the shell, `lora-lab merge … --for vllm`
# writes what vLLM takes and says what it changed, `lora-lab fuse` adds ΔW to a base's own weights, and `lora-lab
# verify` tells whether a checkpoint is that base with that adapter.

# %%
ll.convert("merged", "mlx").save("merged-mlx", force=True)
again = ll.load("merged-mlx")
assert {round(u.norm(), 3) for u in again.updates.values()} == {round(u.norm(), 3) for u in back.updates.values()}
