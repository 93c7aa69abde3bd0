"""Compare diffusion models in the browser, vote blind, and look into training runs.

    python demos/compare.py                                                  # the embedded default, alone
    python demos/compare.py --model out/quickstart/run --runs out            # against a training run
    python demos/compare.py --base stabilityai/stable-diffusion-xl-base-1.0 --model out/lora --model npo:out/negative

Needs the extra `demo`: pip install -e '.[demo]'. demos/README.md tells more.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from diffalign.demo.engine import Engine, limits_from
from diffalign.demo.models import ModelPool, parse_model
from diffalign.demo.runs import Runs
from diffalign.demo.votes import VoteBook
from diffalign.errors import DiffalignError
from diffalign.evaluation.prompts import read_prompts
from reward_models import RewardModelError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: Shown first where the base is not the embedded model, whose own examples are captions of shapes.
PROMPTS = (
    "a red bicycle leaning against a yellow wall",
    "two cats and one dog on a sofa, watercolour",
    "a glass of orange juice left of a blue book",
)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="shapes", help="the first model, and the one LoRAs sit on (default: %(default)s)")
    add("--model", action="append", default=[], metavar="[LABEL=]NAME", help="another model; may be repeated")
    add("--score", action="append", metavar="NAME", help="reward model; may be repeated (the checker for shapes)")
    add("--prompts", metavar="FILE", help="example prompts (.txt, .jsonl, .json, shapes:heldout)")
    add("--steps", type=int, help="what the page begins with (12 for shapes, else 25)")
    add("--guidance", type=float, help="what the page begins with (3 for shapes, else 5)")
    add("--runs", default="out", metavar="FOLDER", help="where training runs are looked for (default: %(default)s)")
    add("--output", default="out/compare", metavar="FOLDER", help="pictures and votes go here (default: %(default)s)")
    add("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address (default: %(default)s)")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--share", action="store_true", help="ask Gradio for a public link")
    add("--password", default=os.environ.get("DIFFALIGN_DEMO_PASSWORD"), help="or DIFFALIGN_DEMO_PASSWORD")
    add("--allow-add", action=argparse.BooleanOptionalAction, help="may people name models? (only on this machine)")
    add("--device", help="cpu, cuda, ... (default: the GPU when there is one)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default: fp16 on a GPU, else fp32")
    add("--keep-gb", type=float, default=12.0, help="weights kept loaded, in GB (default: %(default)s)")
    for name, what in (("steps", "steps"), ("side", "pixels a side"), ("prompts", "prompts"), ("seeds", "seeds")):
        add(f"--max-{name}", type=int, help=f"most {what} of a request")
    add("--batch", type=int, help="pictures drawn at once")
    return parser


def main() -> int:
    """Build the page and serve it until interrupted."""
    options = arguments().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        from diffalign.demo import ui
    except ImportError as error:
        print(f"The demo needs the extra 'demo' ({error}): pip install -e '.[demo]'", file=sys.stderr)
        return 1
    output, local = Path(options.output), options.host in LOOPBACK and not options.share
    own = options.base == "shapes"
    steps, guidance = (12, 3.0) if own else (25, 5.0)
    limits = {name.removeprefix("max_"): value for name, value in vars(options).items() if name.startswith("max_")}
    try:
        engine = Engine(
            output,
            [parse_model(options.base), *(parse_model(name, options.base) for name in options.model)],
            scorers=options.score or (("shapes-strict", "shapes") if own else ()),
            pool=ModelPool(device=options.device, dtype=options.dtype, keep_gb=options.keep_gb),
            limits=limits_from({**limits, "batch": options.batch}),
        )
        demo = ui.Demo(
            engine,
            VoteBook(output / "votes"),
            Runs(options.runs),
            (output / "exports").resolve(),
            base=options.base,
            allow_add=local if options.allow_add is None else options.allow_add,
            prompts=read_prompts(options.prompts, limit=8) if options.prompts else () if own else PROMPTS,
            steps=steps if options.steps is None else options.steps,
            guidance=guidance if options.guidance is None else options.guidance,
        )
        engine.warm_up()
    except (DiffalignError, RewardModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not local and not options.password:
        print("Others can reach this demo and it asks for no password (--password).", file=sys.stderr)
    page = ui.build(demo)
    try:
        url = ui.launch(
            page, demo, host=options.host, port=options.port, share=options.share, password=options.password
        )
    except OSError as error:  # the port is taken, or the address is not this machine's
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Votes go to {demo.votes.folder}. Open {url} ; stop with Ctrl+C.", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
