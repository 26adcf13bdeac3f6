"""Command line of the recipe: `python -m examples.train_demo_model STAGE --run DIR`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from . import checkpoints
from .causal.evaluation import evaluate_causal
from .causal.lora import shrink
from .causal.streamed import stream_causal
from .causal.training import train_causal
from .config import PRESETS, Config
from .denoiser_training import train_denoiser
from .evaluation import evaluate
from .export import export
from .loop import Limits, Run, device_name
from .model_card import write_card
from .scoring import score_folder
from .text_training import train_text
from .vae_training import train_decoder, train_vae
from .windowed import COLUMNS, stream_windows

TRAINING: dict[str, Callable[[Run, Config, Limits], bool]] = {
    "text": train_text,
    "vae": train_vae,
    "denoiser": train_denoiser,
    "decoder": train_decoder,
}
# Minutes of one modern data-centre GPU, used by `all` when nothing else is asked for.
GPU_MINUTES = {"text": 1.0, "vae": 5.0, "denoiser": 14.5, "decoder": 4.5}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m examples.train_demo_model", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder that holds everything")
        command.add_argument("--preset", choices=PRESETS, default="full")
        return machine(command)

    def machine(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, help="CPU threads for PyTorch")
        return command

    for name in (*TRAINING, "all"):
        command = add(name, "every stage in order" if name == "all" else f"train: {name}")
        command.add_argument("--steps", type=int, help="at most this many steps")
        command.add_argument("--minutes", type=float, help="fewer steps if they would take longer than this")
        command.add_argument("--stop-after-minutes", type=float, help="stop with a checkpoint; the schedule stays")
        command.add_argument("--checkpoint-seconds", type=float, default=60.0)
        command.add_argument("--compile", action="store_true", help="use torch.compile")
        command.add_argument("--again", action="store_true", help="train a finished stage anew")
        if name == "all":
            command.add_argument("--to", type=Path, default=Path("pipelines/demo_model"), help="where to export")
    command = add("evaluate", "score the run's model on held-out prompts")
    command.add_argument("--prompts", type=int)
    command.add_argument("--scheduler", choices=("unipc", "euler", "best"), default="best")
    command.add_argument("--to", type=Path, help="write JSON and pictures here instead of the run's folder")
    command = add("export", "write a diffusers folder")
    command.add_argument("--to", type=Path, default=Path("pipelines/demo_model"))
    command.add_argument("--scheduler", choices=("unipc", "euler"))
    command = add("causal", "train the causal few-step mode on a finished model, then measure it")
    command.add_argument("--model", type=Path, default=Path("pipelines/demo_model"), help="the finished model's folder")
    command.add_argument("--from-lora", type=Path, help="begin with the weights of this LoRA, at its rank")
    command.add_argument("--steps", type=int, help="at most this many steps")
    command.add_argument("--minutes", type=float, help="fewer steps if they would take longer than this")
    command.add_argument("--stop-after-minutes", type=float, help="stop with a checkpoint; the schedule stays")
    command.add_argument("--checkpoint-seconds", type=float, default=60.0)
    command.add_argument("--compile", action="store_true", help="use torch.compile")
    command.add_argument(
        "--evaluate-seconds", type=float, help="leave the later settings out after this long; 0: none at all"
    )
    command = add("evaluate-causal", "measure a LoRA of the causal mode on long clips")
    command.add_argument("--model", type=Path, default=Path("pipelines/demo_model"))
    command.add_argument("--lora", type=Path, help="default: the run's own")
    command.add_argument("--prompts", type=int)
    command.add_argument("--frames", type=int)
    command.add_argument("--evaluate-seconds", type=float, help="leave the later settings out after this long")
    command = add("shrink-causal", "write the run's LoRA with a lower rank, in float16")
    command.add_argument("--rank", type=int, required=True)
    command.add_argument("--to", type=Path, required=True, help="file")
    command = add("stream-causal", "measure a LoRA of the causal mode on clips of `tilewise.stream`")
    command.add_argument("--model", type=Path, default=Path("pipelines/demo_model"))
    command.add_argument("--lora", type=Path, help="default: the one in the model's folder")
    command.add_argument("--policies", default="fixed", help="of the cache, comma-separated")
    command.add_argument("--windows", help="in latent frames, comma-separated; default: the recipe's")
    command.add_argument("--prompts", type=int, default=8)
    command.add_argument("--frames", type=int, default=240)
    command.add_argument("--seconds", type=float, help="begin no clip after this long")
    command = add("stream-windows", "measure the model window after window, by the way and against two baselines")
    command.add_argument("--model", type=Path, default=Path("pipelines/demo_model"))
    command.add_argument(
        "--columns",
        default=",".join(COLUMNS),
        help="way and options of each column, comma-separated; strength=0.8 changes a video; clips and frozen are baselines",
    )
    command.add_argument("--prompts", type=int, default=64)
    command.add_argument("--windows", type=int, default=20, help="of a clip")
    command.add_argument("--frames", type=int, help="of a clip, in place of its windows")
    command.add_argument("--steps", type=int, help="default: the model's own")
    command.add_argument("--overlap", type=int, help="latent frames; default: the way's own")
    command.add_argument("--workers", type=int, default=1, help="processes, which share the GPUs")
    command.add_argument("--dtype", default="auto", help="of the model: float32, bfloat16 or auto")
    command.add_argument("--seconds", type=float, help="begin no clip after this long")
    text = "score an exported folder with attention methods; writes its evaluation.json and model card"
    command = machine(commands.add_parser("score", help=text, description=text))
    command.add_argument("--model", type=Path, default=Path("pipelines/demo_model"))
    command.add_argument("--methods", default="dense,sta-balanced", help="comma-separated; dense is always included")
    command.add_argument("--prompts", type=int, default=64)
    command.add_argument("--batch", type=int, default=4)
    command.add_argument("--steps", type=int, help="default: what the folder's tilewise.json says")
    command.add_argument("--guidance", type=float, help="default: what the folder's tilewise.json says")
    command.add_argument(
        "--work", type=Path, default=Path("runs/score"), help="keeps clips, to continue and to look at"
    )
    command.add_argument("--again", action="store_true", help="score anew what is already scored")
    text = "write an exported folder's model card anew, from the files in it"
    command = commands.add_parser("card", help=text, description=text)
    command.add_argument("--model", type=Path, default=Path("pipelines/demo_model"))
    command = add("pack", "split a checkpoint into small files, to carry it to another machine")
    command.add_argument("--what", nargs="+", default=["denoiser.state"])
    command.add_argument("--to", type=Path, required=True)
    command = add("unpack", "join what `pack` wrote")
    command.add_argument("--from", dest="source", type=Path, required=True)
    return top


def main(arguments: list[str] | None = None) -> int:
    """0 when the command finished, 3 when it stopped early as asked."""
    options = parser().parse_args(arguments)
    if options.command == "card":
        print(f"wrote {write_card(options.model)}")
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if options.command == "score":
        words = shlex.join(sys.argv[1:] if arguments is None else arguments)
        score_folder(
            options.model,
            options.methods.split(","),
            device=device,
            count=options.prompts,
            batch=options.batch,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            work=options.work,
            again=options.again,
            command=f"python -m examples.train_demo_model {words}",
        )
        return 0
    run = Run(options.run, device, options.seed, getattr(options, "compile", False))
    run.folder.mkdir(parents=True, exist_ok=True)
    config = replace(PRESETS[options.preset](), seed=options.seed)
    run.say(f"{options.command} on {device_name(device)}, torch {torch.__version__}, preset {config.name}")

    if options.command in TRAINING:
        return 0 if _train(options.command, run, config, options, options.minutes) else 3
    if options.command == "all":
        for stage in TRAINING:
            minutes = options.minutes or (GPU_MINUTES[stage] if device.type == "cuda" else None)
            if not _train(stage, run, config, options, minutes):
                return 3
        evaluate(run, config)
        export(run, config, options.to)
    elif options.command == "evaluate":
        evaluate(run, config, scheduler=options.scheduler, prompts=options.prompts, folder=options.to)
    elif options.command == "causal":
        return 0 if _causal(run, config, options) else 3
    elif options.command == "evaluate-causal":
        lora = options.lora or run.path("causal_lora.safetensors")
        evaluate_causal(
            run,
            config,
            options.model,
            lora,
            prompts=options.prompts,
            frames=options.frames,
            seconds=options.evaluate_seconds,
        )
    elif options.command == "shrink-causal":
        tensors, lost = shrink(checkpoints.load(run.path("causal_lora.safetensors"))[0], options.rank)
        checkpoints.save(options.to, tensors)
        run.say(f"wrote {options.to}, rank {options.rank}: {lost:.2%} of the squared change is lost")
    elif options.command == "stream-causal":
        stream_causal(
            run,
            options.model,
            options.lora or options.model / "causal" / "causal_lora.safetensors",
            policies=options.policies.split(","),
            windows=options.windows and [int(window) for window in options.windows.split(",")],
            prompts=options.prompts,
            frames=options.frames,
            seconds=options.seconds,
        )
    elif options.command == "stream-windows":
        stream_windows(
            run,
            options.model,
            columns=options.columns.split(","),
            prompts=options.prompts,
            windows=options.windows,
            frames=options.frames,
            steps=options.steps,
            overlap=options.overlap,
            seconds=options.seconds,
            workers=options.workers,
            dtype=options.dtype,
        )
    elif options.command == "export":
        export(run, config, options.to, options.scheduler)
    elif options.command == "pack":
        for what in options.what:
            for path in checkpoints.pack(run.path(f"{what}.safetensors"), options.to):
                run.say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    elif options.command == "unpack":
        for path in checkpoints.unpack(options.source, run.folder):
            run.say(f"wrote {path}")
    return 0


def _causal(run: Run, config: Config, options: argparse.Namespace) -> bool:
    stop = options.stop_after_minutes
    limits = Limits(
        steps=options.steps or config.causal.steps,
        minutes=options.minutes,
        stop_at=None if stop is None else run.started + stop * 60,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    finished = train_causal(run, config, limits, options.model, options.from_lora)
    if options.evaluate_seconds != 0:
        lora = run.path("causal_lora.safetensors")
        evaluate_causal(run, config, options.model, lora, seconds=options.evaluate_seconds)
    return finished


def _train(stage: str, run: Run, config: Config, options: argparse.Namespace, minutes: float | None) -> bool:
    if options.again:
        for suffix in ("safetensors", "state.safetensors"):
            run.path(f"{stage}.{suffix}").unlink(missing_ok=True)
    if run.path(f"{stage}.safetensors").exists():
        run.say(f"{stage}: already done")
        return True
    steps = {
        "text": config.text.steps,
        "vae": config.vae.steps,
        "denoiser": config.denoiser.steps,
        "decoder": config.vae.decoder_steps,
    }[stage]
    stop = options.stop_after_minutes
    limits = Limits(
        steps=options.steps or steps,
        minutes=minutes,
        stop_at=None if stop is None else run.started + stop * 60,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    begun = time.monotonic()
    finished = TRAINING[stage](run, config, limits)
    run.say(f"{stage}: {'finished' if finished else 'stopped'} after {(time.monotonic() - begun) / 60:.1f} min")
    return finished


if __name__ == "__main__":
    sys.exit(main())
