"""`ropewalk demo`: load the shipped checkpoint, continue a prompt, and show what its rotary embedding is for."""

from __future__ import annotations

import argparse
import logging
import time

from ropewalk.commands.options import add_threads, positive
from ropewalk.shipped import FOLDER, NAME, held_out_text
from ropewalk.terminal import Output, size, table

PROMPT = "And it came to pass in those days, that the king"
ROPES = ("none", "linear", "yarn", "partial-ntk")
TOKENS = 16384  # of the held-out text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"what to continue (default: {PROMPT!r})")
    parser.add_argument("--max-new-tokens", type=positive, default=120, metavar="N", help="(default: 120)")
    parser.add_argument("--plot", metavar="FILE", help="draw the table to a PNG")
    add_threads(parser)


def run(args: argparse.Namespace, out: Output) -> None:
    """Run the main job on the shipped model."""
    began = time.perf_counter()
    import torch

    from ropewalk.bench.perplexity import perplexity
    from ropewalk.generation import context_length, generate
    from ropewalk.loader.inspect import inspect
    from ropewalk.loader.load import load
    from ropewalk.loader.quantizer import install_rope
    from ropewalk.loader.rope import decide_rope

    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("ropewalk").setLevel(logging.WARNING)  # what it would say is said below
    found = inspect(FOLDER)
    decision = decide_rope(load_config())
    packing = f"{found['bits']} bits, groups of {found['group_size']}, act-order"
    out.say(f"model  {NAME}: {packing}, {size(found['bytes']['total'])}")
    out.say(f"rope   {decision}")
    out.say(f"why    {decision.why}")
    model, tokenizer = load(FOLDER)
    device = model.device.type
    out.say(f"device {device}, {torch.get_num_threads()} threads\n" if device == "cpu" else f"device {device}\n")

    made = generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=1,
        on_start=lambda: out.say(args.prompt, end=""),
        on_text=lambda piece: out.say(piece, end=""),
    )
    out.say(f"\n\n{made.tokens_per_second:.1f} tokens/s\n")

    longest = context_length(model)
    original = model.config.original_max_position_embeddings
    contexts = (original // 2, original, original * 2, longest)
    ids = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"])
    ids = ids[: min(TOKENS, len(ids)) // longest * longest]
    results: dict[str, dict[str, float]] = {}
    with out.bar(len(ids) * len(contexts) * len(ROPES), "perplexity") as bar:
        for rope in ROPES:
            install_rope(model, decide_rope(load_config(), rope))
            results[rope] = {str(n): perplexity(model, ids, n, progress=bar.update) for n in contexts}
    install_rope(model, decision)
    out.say(
        f"perplexity of {len(ids):,} tokens it has not seen, by context and --rope (trained up to {original} tokens,"
    )
    out.say(f"then tuned to {longest} with {decision.type}):")
    out.say(
        table([("context", *map(str, contexts))] + [(r, *(f"{v:.1f}" for v in results[r].values())) for r in ROPES])
    )
    if args.plot:
        from ropewalk.plot import plot_perplexity

        plot_perplexity(results, args.plot, title="Perplexity by context and rotary embedding", mark=original)
        out.note(f"plot: {args.plot}")
    out.note(f"{time.perf_counter() - began:.0f} s in all")
    out.result(
        {
            "model": NAME,
            "rope": decision.as_dict(),
            "text": args.prompt + made.text,
            "tokens_per_second": made.tokens_per_second,
            "device": device,
            "tokens": len(ids),
            "perplexity": results,
            "seconds": time.perf_counter() - began,
        }
    )


def load_config() -> dict:
    """Return the shipped model's config.json."""
    from ropewalk.loader.quantize_config import read_json

    return read_json(FOLDER / "config.json")
