"""Makes ``upstream_objectives.json``: what the authors' own functions give on tensors that ``test_dpo.drawn`` draws.

    python -m tests.goldens.make_objectives SDPO MAPO KTO     # three clones: see "provenance" in the file

Of each repository the function, or the lines of the loss, are cut out of the file and run as they are; none is kept.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from tests.test_dpo import drawn

HERE = Path(__file__).parent


def source(clone: str, file: str) -> tuple[str, str]:
    """A file of a clone's HEAD, and the commit."""
    show = ["git", "-C", clone]
    commit = subprocess.run([*show, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    shown = subprocess.run([*show, "show", f"HEAD:{file}"], capture_output=True, text=True, check=True)
    return shown.stdout, commit


def function(text: str, name: str) -> Any:
    """The function ``name`` of a module that is not imported."""
    node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name)
    space: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(ast.Module([node], []), name, "exec"), space)
    return space[name]


def lines(text: str, first: str, last: str, **names: Any) -> dict[str, Any]:
    """What the lines from the one that matches ``first`` to the one before ``last`` leave, of ``names`` before them."""
    body = text.splitlines()
    begin = next(k for k, line in enumerate(body) if re.search(first, line))
    end = next(k for k, line in enumerate(body) if k > begin and re.search(last, line))
    space = {"torch": torch, "F": F} | names
    exec(compile(textwrap.dedent("\n".join(body[begin:end])), first, "exec"), space)
    return space


def pairs(seed: int, sdpo: str, mapo: str) -> dict[str, Any]:
    winner, loser, then = (x.detach().reshape(-1, 1, 4, 4) for x in drawn(seed))
    pred, target = torch.cat([winner, loser]), torch.zeros(6, 1, 4, 4, dtype=torch.float64)
    found: dict[str, Any] = {"seed": seed}
    for name, method, beta in (("dpo", "diffusion-dpo", 300.0), ("dspo", "dspo", 0.05)):
        args = SimpleNamespace(use_winner_preserving=False, beta_dpo=beta, train_method=method, sdxl=False)
        names = {
            "args": args,
            "model_pred": pred,
            "target": target,
            "ref_unet": lambda **_: SimpleNamespace(sample=then),
            "model_batch_args": (),
            "added_cond_kwargs": None,
        }
        found[name] = lines(sdpo, r"model_losses = \(model_pred", r"== 'dmpo'", **names)["loss"].item()
    scale = function(sdpo, "get_adaptive_lose_l_scale")
    found["lambda"] = {
        mu: [scale(pred[[k, k + 3]], target[:2], float(mu), eps=0.0).item() for k in range(3)] for mu in ("0.0", "0.9")
    }
    args = SimpleNamespace(snr_value=0.5, beta_mapo=0.1)
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    # the file casts to float32; here in what it is given, for a value to compare in float64
    found["mapo"] = function(mapo.replace(".float()", ""), "compute_loss")(args, scheduler, pred, target)[0].item()
    return found


def thumbs(seed: int, text: str) -> dict[str, Any]:
    """Diffusion-KTO's loss of six images, in one batch."""
    winner, loser, then = (x.detach() for x in drawn(seed))
    shift = 0.05 * (seed - 1)  # so that the reference point is below 0, and above
    names = {
        "model_losses": torch.cat([winner, loser]).square().mean(1) - shift,
        "ref_loss": then.square().mean(1),
        "args": SimpleNamespace(
            beta_dpo=20.0, bce_offset="none", halo="sigmoid", loss="kto", lambda_d_kto=1.5, lambda_u_kto=0.5
        ),
        "batch": {"labels": torch.tensor([1, 0, 0, 1, 1, 0])},
        "accelerator": SimpleNamespace(reduce=lambda x, reduction: x),
    }
    left = lines(text, r"policy_KL_logps = -model_losses", r"accelerator.backward\(loss\)", **names)
    return {"seed": seed, "z": left["kl"].item(), "loss": left["loss"].item()}


def main(sdpo: str, mapo: str, kto: str) -> None:
    files = {
        "AIDC-AI/Diffusion-SDPO": (sdpo, "train.py"),
        "mapo-t2i/mapo": (mapo, "utils.py"),
        "jacklishufan/diffusion-kto": (kto, "train_kto_sd_v1.5.py"),
    }
    texts = {name: source(*where) for name, where in files.items()}
    (sdpo_text, _), (mapo_text, _), (kto_text, _) = texts.values()
    made = {
        "provenance": {name: f"{files[name][1]} of commit {commit}" for name, (_, commit) in texts.items()},
        "pairs": [pairs(seed, sdpo_text, mapo_text) for seed in range(3)],
        "thumbs": [thumbs(seed, kto_text) for seed in range(3)],
    }
    (HERE / "upstream_objectives.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
