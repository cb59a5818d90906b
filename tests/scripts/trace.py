"""Record what a script does to model, tokenizer and files, in this process or on two ranks."""

import importlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from tests.processes import forked, write_stderr_to
from util import errors


def norms(parameters) -> torch.Tensor:
    """Return the norm of each parameter, to compare them."""
    return torch.stack([parameter.detach().double().norm() for parameter in parameters])


class Trace:
    """Lists of what a script did, in order.

    Attributes:
        batches: each forward pass of a TokenBridge: ``latents``, ``labels``, ``loss``, whether ``training``, the type
            of ``autocast``, whether there were ``gradients`` already, the model's ``class_emb``, and in training the
            ``order`` of the tokens.
        drawn: each posterior that was sampled: its ``moments`` and the ``latents`` drawn.
        images: each batch that a tokenizer encoded.
        decoded: each batch that one decoded.
        sampled: each call of ``sample_tokens``: its arguments, ``latents`` and the model's ``class_emb``.
        steps: the norms of the parameters after each optimizer step.
        saved: each dictionary that ``torch.save`` wrote, without its tensors.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Clear all lists."""
        self.batches, self.drawn, self.images, self.decoded = [], [], [], []
        self.sampled, self.steps, self.saved, self.orders = [], [], [], []

    def install(self, patch: Callable[[Any, str, Any], None]) -> None:
        """Start to record; ``patch`` is ``setattr`` or pytest's."""
        forward, sample_orders = TokenBridge.forward, TokenBridge.sample_orders
        sample, sample_tokens = DiagonalGaussianDistribution.sample, TokenBridge.sample_tokens
        encode, decode, save = AutoencoderKL.encode, AutoencoderKL.decode, torch.save

        def traced_forward(model, latents, labels, *args):
            dtype = (
                torch.get_autocast_dtype("cpu")
                if torch.is_autocast_enabled("cpu")
                else torch.float32
            )
            batch = {
                "latents": latents.detach().clone(),
                "labels": labels.clone(),
                "autocast": dtype,
            }
            batch |= {"class_emb": model.class_emb.weight.detach().clone()}
            batch |= {
                "training": model.training,
                "gradients": any(p.grad is not None for p in model.parameters()),
            }
            loss = forward(model, latents, labels, *args)
            self.batches.append(
                batch | {"loss": loss.item(), "order": self.orders[-1] if not args else None}
            )
            return loss

        def traced_orders(model, bsz):
            self.orders.append(sample_orders(model, bsz))
            return self.orders[-1]

        def traced_sample(posterior, noise=None):
            latents = sample(posterior, noise)
            self.drawn.append({"moments": posterior.parameters.clone(), "latents": latents.clone()})
            return latents

        def traced_sample_tokens(
            model, bsz, num_iter, cfg, cfg_schedule, labels, temperature, **options
        ):
            given = {
                "num_iter": num_iter,
                "cfg": cfg,
                "cfg_schedule": cfg_schedule,
                "labels": labels,
            }
            given |= {
                "temperature": temperature,
                "class_emb": model.class_emb.weight.detach().clone(),
                **options,
            }
            found = sample_tokens(
                model, bsz, num_iter, cfg, cfg_schedule, labels, temperature, **options
            )
            self.sampled.append({**given, "latents": found[0], "config": model.config})
            return found

        def traced_encode(vae, x):
            self.images.append(x.clone())
            return encode(vae, x)

        def traced_decode(vae, z):
            self.decoded.append(z.clone())
            return decode(vae, z)

        def traced_save(content, *args, **options):
            plain = {name: value for name, value in content.items() if isinstance(value, int | str)}
            self.saved.append(plain)
            return save(content, *args, **options)

        patch(TokenBridge, "forward", traced_forward)
        patch(TokenBridge, "sample_orders", traced_orders)
        patch(TokenBridge, "sample_tokens", traced_sample_tokens)
        patch(DiagonalGaussianDistribution, "sample", traced_sample)
        patch(AutoencoderKL, "encode", traced_encode)
        patch(AutoencoderKL, "decode", traced_decode)
        patch(torch, "save", traced_save)
        adam, adamw = torch.optim.Adam, torch.optim.AdamW
        for kind, step in ((adam, adam.step), (adamw, adamw.step)):  # which may be the same
            patch(kind, "step", self.traced_step(step))

    def traced_step(self, step: Callable) -> Callable:
        """Return an optimizer's ``step`` that is recorded."""

        def traced(optimizer, *args, **options):
            result = step(optimizer, *args, **options)
            self.steps.append(norms(p for group in optimizer.param_groups for p in group["params"]))
            return result

        return traced


def traced_two(
    folder: Path, script: str, command: str, signaled: int | None = None
) -> tuple[list[dict], list[str], list[int]]:
    """Run a script on two ranks; return each rank's trace, standard error and exit status.

    Args:
        folder: where the ranks leave these.
        signaled: a rank that gets SIGUSR1 in its second forward pass.
    """
    main = importlib.import_module(script).main

    def start(rank: int) -> None:
        write_stderr_to(folder / f"stderr{rank}")
        trace = Trace()
        trace.install(setattr)
        if rank == signaled:
            forward, calls = TokenBridge.forward, []

            def signal_in_second_pass(*args):
                calls.append(args)
                if len(calls) == 2:
                    signal.raise_signal(signal.SIGUSR1)
                return forward(*args)

            TokenBridge.forward = signal_in_second_pass
        sys.argv = [f"{script}.py", *command.split(), "--device", "cpu"]
        try:
            errors.run(main)
        finally:
            entries = {
                name: getattr(trace, name) for name in ("batches", "drawn", "images", "steps")
            }
            entries["saved"] = list(trace.saved)
            torch.save(entries, folder / f"trace{rank}.pt")

    statuses = forked(2, start)[1]
    traces = [torch.load(folder / f"trace{rank}.pt", weights_only=True) for rank in range(2)]
    return traces, [(folder / f"stderr{rank}").read_text() for rank in range(2)], statuses
