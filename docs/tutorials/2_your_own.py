# %% [markdown]
# # Your own model, metric and adapters
#
# You have a model of your own, adapters that you trained with code of your own, and the metric of your field. This
# page asks the same questions about them. The model here is tiny and made up, so that the page runs in seconds; any
# `torch.nn.Module` that PEFT can adapt will do.

# %%
import numpy as np
import torch
from peft import LoraConfig, get_peft_model

import lora_lab as ll


class Net(torch.nn.Module):
    """Three layers from 8 numbers to one."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
        self.out = torch.nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)[:, 0]


def build():
    """The base model: always the same."""
    torch.manual_seed(0)
    return Net()


generator = torch.Generator().manual_seed(1)
x = torch.randn(300, 8, generator=generator)
y = torch.sin(x[:, 0]) + 0.5 * x[:, 1]

# %% [markdown]
# A task is a model, data in splits, and a function that scores a batch: for each example, named numbers. Which
# metrics are made of them, you say by name: `rmse` and `spearman` need `prediction` and `target`. A metric like
# Spearman's correlation is no mean over examples; lora-lab resamples the examples for its interval all the same.


# %%
def score(model, batch):
    """Prediction and truth of every example, and the loss, which is told beside the metrics."""
    found = model(batch["x"])
    return {"loss": (found - batch["y"]) ** 2, "prediction": found, "target": batch["y"]}


def part(start, stop):
    """Some of the examples."""
    return {"x": x[start:stop], "y": y[start:stop]}


task = ll.Task(
    model=build,
    data={"train": part(0, 200), "validation": part(200, 250), "test": part(250, 300)},
    score=score,
    metrics=("rmse", "spearman"),
)

# %% [markdown]
# Adapters that your own loop trained are PEFT folders. Here is such a loop.

# %%
for seed in (0, 1):
    torch.manual_seed(seed)
    model = get_peft_model(build(), LoraConfig(r=2, lora_alpha=4, target_modules=["layers.0", "layers.1", "layers.2"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(80):
        i = torch.randperm(200, generator=torch.Generator().manual_seed(step + 1000 * seed))[:32]
        loss = ((model(x[i]) - y[i]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(f"mine-s{seed}")

# %% [markdown]
# They do not say how they were trained. `record` puts that in, so that tables and figures group them rightly; nothing
# else in the files is changed.

# %%
for seed in (0, 1):
    ll.record(f"mine-s{seed}", method="lora", seed=seed)

table = ll.evaluate(["mine-s0", "mine-s1"], task, progress=False)
for row in table.rows():
    print(row["adapter"], f"rmse {row['rmse']:.3f} [{row['rmse_low']:.3f}, {row['rmse_high']:.3f}]")

# %% [markdown]
# The same questions, the same functions; t goes from 0 at the first adapter to 1 at the second, and `delta` averages
# what they add to the weights. Each answer goes by your first metric, in its direction: a barrier in RMSE
# is a rise, one in a correlation would be a fall.

# %%
line = ll.interpolate(["mine-s0", "mine-s1"], task, points=5, progress=False)
for row in line.rows(space="delta"):
    print(f"t = {row['t']:.2f}: rmse {row['rmse']:.3f}")
ll.figure(line).savefig("rmse.pdf")
assert np.isfinite([row["rmse"] for row in line.rows()]).all()
