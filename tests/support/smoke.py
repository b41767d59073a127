"""The first steps of a user, in an environment with nothing but the wheel and its dependencies."""

import importlib.util
import sys

import torch
from safetensors.torch import load_file, save_file

from msft_store import KeepLast, Store, Timeline

OPTIONAL = ("transformers", "accelerate", "matplotlib", "obstore", "datasets", "peft")

if found := [name for name in OPTIONAL if importlib.util.find_spec(name)]:
    sys.exit(f"{', '.join(found)}: installed, so this is no empty environment")
save_file({"w": torch.zeros(64, 64)}, "base.safetensors")
store = Store.create("store")
base = store.add_base("base.safetensors")
with Timeline(store, base, retention=KeepLast(2)) as timeline:
    saved = [timeline.commit({"w": torch.full((64, 64), float(n))}, step=n) for n in range(3)]
    restored = timeline.rollback(saved[1])
store.export(saved[1], "out")
exported = load_file("out/model.safetensors")
if not all(torch.equal(state["w"], torch.ones(64, 64)) for state in (restored, exported)):
    sys.exit("what came back is not what was saved")
if store.check():
    sys.exit("the store is damaged")
