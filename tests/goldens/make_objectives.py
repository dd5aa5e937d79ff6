"""Makes ``upstream_objectives.json``: what the authors' own functions give on tensors that the tests draw.

    python -m tests.goldens.make_objectives SDPO MAPO KTO DIFFUSERS FLOWCPS DANCEGRPO UNIRL ALIGNPROP

with a clone each: see "provenance" in the file.

Of each repository the function, or the lines of the loss, are cut out of the file and run as they are; none is kept.
"""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from tests.test_direct_reward import Linear, Near, direct_start
from tests.test_dpo import drawn
from tests.test_policy_gradient import surrogate_drawn
from tests.test_process import steps_drawn

HERE = Path(__file__).parent


def source(clone: str, file: str) -> tuple[str, str]:
    """A file of a clone's HEAD, and the commit."""
    show = ["git", "-C", clone]
    commit = subprocess.run([*show, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    shown = subprocess.run([*show, "show", f"HEAD:{file}"], capture_output=True, text=True, check=True)
    return shown.stdout, commit


def function(text: str, name: str, **names: Any) -> Any:
    """The function ``name`` of a module that is not imported, with float64 where it casts to float32."""
    text = text.replace(".float()", ".double()").replace(".to(torch.float32)", "")
    node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name)
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)  # types that are not imported stay words
    space: dict[str, Any] = {"torch": torch, "F": F, "math": math} | names
    exec(compile(ast.fix_missing_locations(ast.Module([future, node], [])), name, "exec"), space)
    return space[name]


def lines(text: str, first: str, last: str, **names: Any) -> dict[str, Any]:
    """What the lines from the one that matches ``first`` to the one before ``last`` leave, of ``names`` before them."""
    body = text.splitlines()
    begin = next(k for k, line in enumerate(body) if re.search(first, line))
    end = next(k for k, line in enumerate(body) if k > begin and re.search(last, line))
    space = {"torch": torch, "F": F} | names
    exec(compile(textwrap.dedent("\n".join(body[begin:end])), first, "exec"), space)
    return space


def pairs(seed: int, sdpo: str, mapo: str, orpo: str) -> dict[str, Any]:
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
    found["mapo"] = function(mapo, "compute_loss")(args, scheduler, pred, target)[0].item()
    names = {"model_pred": pred, "target": target, "args": SimpleNamespace(beta_orpo=0.1)}
    left = lines(
        orpo.replace(".float()", ".double()"), r"model_losses = F.mse_loss", r"accelerator.backward\(loss\)", **names
    )
    found["orpo"] = left["loss"].item()
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


def transitions(cps: str, dance: str) -> list[dict[str, Any]]:
    """Flow-CPS's and DanceGRPO's step from every knot of a flow's grid of five."""
    step, flux = function(cps, "sde_step_with_logprob"), function(dance, "flux_step")
    x, v, y = steps_drawn()
    grid = torch.linspace(1, 0, 6, dtype=torch.float64)
    found = []
    for i in range(5):
        scheduler = SimpleNamespace(sigmas=grid, index_for_timestep=lambda index: index)
        _, _, mean, std = step(scheduler, v, [i] * len(x), x, noise_level=0.8, prev_sample=y)
        _, _, log_prob = flux(v, x, 0.3, grid, i, y, True, True)
        end, _ = flux(v, x, 0.3, grid, i, y, False, True)
        found.append(
            {
                "cps": {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()},
                "dance": {"mean": end.flatten().tolist(), "log_prob": log_prob.tolist()},
            }
        )
    return found


def masked(unirl: str) -> dict[str, Any]:
    """Flow-DPPO's loss of eight steps, and the share of those without a gradient."""
    log_ratio, advantage, means = surrogate_drawn()
    found, told = function(unirl, "_flowdppo_kl_adv_loss", _gaussian_kl_div=function(unirl, "_gaussian_kl_div"))(
        new_logp=log_ratio[:, None],
        old_logp=torch.zeros(8, 1, dtype=torch.float64),
        new_means=means[:, None],
        old_means=torch.zeros_like(means)[:, None],
        advantages=advantage[:, None],
        sigma_t=torch.tensor(0.5, dtype=torch.float64),
        kl_mask_threshold=0.02,
    )
    return {"loss": found.flatten().tolist(), "masked": told["masked_fraction"].item()}


def truncated(alignprop: str) -> dict[str, list[float]]:
    """AlignProp's gradient of a reward to a linear network's a and b, by the step of five that it begins at."""
    found = {}
    for begins in range(5):
        toy = Linear()
        names = {
            "timesteps": range(5),
            "latents": direct_start(),
            "pipeline": SimpleNamespace(
                scheduler=SimpleNamespace(scale_model_input=lambda x, t: x),
                unet=lambda x, t, toy=toy, **_: (toy.a * x + toy.b,),
            ),
            "scheduler_step": lambda _, v, t, x, eta: SimpleNamespace(latents=x - v / 5, log_probs=None),
            "prompt_embeds": None,
            "cross_attention_kwargs": None,
            "do_classifier_free_guidance": False,
            "gradient_checkpoint": False,
            "guidance_rescale": 0.0,
            "eta": 0.0,
            "backprop_timestep": begins,
        }
        left = lines(alignprop, r"for i, t in enumerate", r"all_latents.append", **names)
        loss = -Near().score(images=toy.to_image(left["latents"]), prompts=[]).mean()
        found[str(begins)] = [each.item() for each in torch.autograd.grad(loss, [toy.a, toy.b])]
    return found


def main(*clones: str) -> None:
    files = {
        "AIDC-AI/Diffusion-SDPO": "train.py",
        "mapo-t2i/mapo": "utils.py",
        "jacklishufan/diffusion-kto": "train_kto_sd_v1.5.py",
        "huggingface/diffusers": "examples/research_projects/diffusion_orpo/train_diffusion_orpo_sdxl_lora.py",
        "IamCreateAI/FlowCPS": "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py",
        "XueZeyue/DanceGRPO": "fastvideo/train_grpo_flux.py",
        "Tencent-Hunyuan/UniRL": "unirl/algorithms/flowdppo.py",
        "mihirp1998/AlignProp": "sd_pipeline.py",
    }
    found = {name: source(clone, file) for (name, file), clone in zip(files.items(), clones, strict=True)}
    sdpo, mapo, kto, orpo, cps, dance, unirl, alignprop = (text for text, _ in found.values())
    made = {
        "provenance": {name: f"{files[name]} of commit {commit}" for name, (_, commit) in found.items()},
        "pairs": [pairs(seed, sdpo, mapo, orpo) for seed in range(3)],
        "thumbs": [thumbs(seed, kto) for seed in range(3)],
        "transitions": transitions(cps, dance),
        "flow_dppo": masked(unirl),
        "alignprop": truncated(alignprop),
    }
    (HERE / "upstream_objectives.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
