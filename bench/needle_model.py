"""Make the small model that finds needles: unpack the one that ships, and tune it on its text and on the task.

    python -m ropewalk.bench.needle_model OUT

The 4-bit model of src/ropewalk/models is unpacked to floats and learns on, first in windows of 256 tokens and then
of 1024, under the partial NTK scaling that its config implies. The windows are its own text, and in most of them
lines such as "The number of Moses is 471." are hidden and asked for later (needle.py). Written is OUT, a plain
float16 model with its card. Everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from ropewalk.bench.corpus import load_corpus
from ropewalk.bench.needle import KEYS, VALUES, Line, Needles, splice
from ropewalk.bench.perplexity import perplexity
from ropewalk.bench.small_model import ARCHITECTURE, CONTEXT, FACTOR, batches, encode, run, save
from ropewalk.gptq.format import dequantize, zeros_v1_to_v2
from ropewalk.shipped import FOLDER

NAME = "strand-4m-needle-1k"
TOKENS_PER_STEP = 2048
STEPS = (150, 300)
MUON_LR = 0.003
WITH_NEEDLES = 0.75  # of the windows
WATCHED = 32768  # tokens of the held-out text that are read along the way


CARD = """\
# {name}

A Llama of {parameters:,} parameters in float16, made to show on a small scale what a long context is worth: it looks
up lines that it has read, up to {longest} tokens before. It is strand-4m-pntk-1k-gptq, the model that ships with
ropewalk, unpacked from its 4 bits and tuned on. Like that one's, its config does not name its rotary embedding but
for `original_max_position_embeddings` {context} beside `max_position_embeddings` {longest}; partial NTK by {factor}
is meant.

**The task.** Lines such as "The word of Moses is gold." stand in real text, with one of {keys} names and one of
{values} words; the prompt ends with "The word of Moses is". `ropewalk needle` tests it, by length and depth, in text
that neither model has seen.

**Tuning.** {stages};
{tokens:,} tokens a step, three windows of four with up to {needles} lines in them, the others text alone.
The loss is that over the text plus that over the words asked for. Muon (rate {rate}) and AdamW (a tenth), bfloat16,
seed {seed}, {threads} CPU thread: {minutes:.0f} minutes on a busy machine. The text is that of the shipped model (its
card tells of it): {training_tokens:,} tokens, and {held_out_tokens:,} held out.
`python -m ropewalk.bench.needle_model OUT` does it again.

**Perplexity** of all the held-out text, in windows that do not overlap: {perplexity}.
That of the 4-bit model it comes from is 23.03 at 256 tokens and 21.95 at 1024.

The weights have the SHA-256 `{sha256}`.

**Licence.** The weights, like the texts, are free for any use (CC0 1.0).
"""


class Stage(NamedTuple):
    """A part of the tuning: tokens of a window, steps, and how many needles are in a window at most."""

    context: int
    steps: int
    needles: int


class Batch(NamedTuple):
    """Tokens [B, T], and for each whether it counts as text, and whether it is a value that is asked for."""

    tokens: Tensor
    text: Tensor
    values: Tensor


def main(arguments: list[str] | None = None) -> int:
    """Unpack, tune, save; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ropewalk.bench.needle_model", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--cache", type=Path, default=Path(".cache/corpus"), help="where the text is kept")
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="of each stage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    training, held_out = load_corpus(args.cache)
    ids, unseen = encode(tokenizer, training), encode(tokenizer, held_out)
    stages = [
        Stage(CONTEXT // 2, args.steps[0], needles=4),
        Stage(CONTEXT * FACTOR, args.steps[1], needles=16),
    ]
    model = build()
    log = tune(model, ids, unseen, Needles(tokenizer), stages, args.seed, lambda: save(model, tokenizer, args.out))
    log["sha256"] = save(model, tokenizer, args.out)
    (args.out / "training.json").write_text(json.dumps(log, indent=2) + "\n")
    (args.out / "README.md").write_text(model_card(log), encoding="utf-8")
    return 0


def model_card(log: dict[str, Any]) -> str:
    """Return the card of the model, from what was logged of its making."""
    stages = log["stages"]
    return CARD.format(
        name=NAME,
        **{key: log[key] for key in ("parameters", "seed", "threads", "training_tokens", "held_out_tokens", "sha256")},
        longest=CONTEXT * FACTOR,
        context=CONTEXT,
        factor=FACTOR,
        keys=len(KEYS),
        values=len(VALUES),
        stages=", then ".join(f"{stage['steps']} steps in windows of {stage['context']} tokens" for stage in stages),
        tokens=TOKENS_PER_STEP,
        needles=" or ".join(str(stage["needles"]) for stage in stages),
        rate=MUON_LR,
        minutes=sum(stage["minutes"] for stage in stages),
        perplexity=", ".join(f"{value:.2f} at {n} tokens" for n, value in log["held_out_perplexity"].items()),
    )


def unpacked(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint of 4 bits in AutoGPTQ's first format as float32 under transformers' names."""
    found = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "quantize_config.json").read_text())
    weights = {}
    for name, tensor in found.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            zeros = zeros_v1_to_v2(found[f"{layer}.qzeros"], settings["bits"])
            weights[f"{layer}.weight"] = dequantize(
                tensor,
                found[f"{layer}.scales"],
                zeros,
                found[f"{layer}.g_idx"],
                bits=settings["bits"],
                group_size=settings["group_size"],
            ).T.contiguous()
        elif part not in ("qzeros", "scales", "g_idx"):
            weights[name] = tensor.float()
    return weights


def build() -> Any:
    """Return the shipped model in float32, with its rotary embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ropewalk.loader.rotary import RopewalkRotaryEmbedding, register_rope_types

    register_rope_types()
    rope = {
        "rope_type": "partial-ntk",
        "factor": float(FACTOR),
        "original_max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
    }
    config = LlamaConfig(**ARCHITECTURE, max_position_embeddings=CONTEXT * FACTOR, rope_parameters=rope)
    model = LlamaForCausalLM(config)
    model.load_state_dict(unpacked(FOLDER))
    model.model.rotary_emb = RopewalkRotaryEmbedding(model.config)
    return model


def mixture(ids: Tensor, needles: Needles, stage: Stage, seed: int) -> Iterator[Batch]:
    """Yield the batches of a stage: text as it is, and most of it with needles (see `hide`)."""
    generator = torch.Generator().manual_seed(seed)
    for rows in batches(ids, stage.context, stage.steps, TOKENS_PER_STEP):
        text, values = torch.ones(rows.shape), torch.zeros(rows.shape)
        for row, kind in enumerate(torch.rand(len(rows), generator=generator)):
            if kind < WITH_NEEDLES:
                rows[row], text[row], values[row] = hide(rows[row], needles, stage.needles, generator)
        yield Batch(rows, text, values)


def hide(window: Tensor, needles: Needles, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return a window [T] with needles and questions in it, and the two marks of `Batch` for each token.

    The window begins with <s> and holds one to `most` needles, each asked for once. In half of the windows the
    questions stand together at the end, so that all distances are as likely; in the others anywhere behind their
    needle. Neither counts as text: else the model would come to expect them in texts where there are none. What no
    longer fits falls off the end of the text.
    """

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    lines = needles.draw(1 + draw(most), generator)
    room = len(window) - len(needles.begin) - 2 * sum(len(line.whole) for line in lines)
    at_end = draw(2) == 1
    events = []  # (place in the text, whether it is asked, the order of questions, the needle)
    for line in lines:
        first, second = sorted((draw(room + 1), draw(room + 1)))
        events += [(first, 0, 0, line), (room if at_end else second, 1, draw(1 << 20), line)]
    events.sort(key=lambda event: event[:3])

    def spliced(begin: Sequence[int], text: Tensor, of: Callable[[int, Line], Sequence[int]]) -> Tensor:
        return torch.cat([torch.tensor(begin), splice(text, [(at, of(asked, line)) for at, asked, _, line in events])])

    nothing = [0] * len(needles.begin)
    whole = spliced(needles.begin, window[:room], lambda _, line: line.whole)
    text = spliced(nothing, torch.ones(room, dtype=torch.long), lambda _, line: [0] * len(line.whole))
    values = spliced(
        nothing,
        torch.zeros(room, dtype=torch.long),
        lambda asked, line: [0] * len(line.question) + [asked] * len(line.value) + [0] * len(line.end),
    )
    return whole, text, values


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Return the mean loss over the text plus that over the values asked for."""
    logits = model(batch.tokens, use_cache=False).logits[:, :-1]
    each = cross_entropy(logits.flatten(0, 1).float(), batch.tokens[:, 1:].flatten(), reduction="none")
    text, values = batch.text[:, 1:].flatten(), batch.values[:, 1:].flatten()
    return (each * text).sum() / text.sum() + (each * values).sum() / values.sum().clamp(min=1)


def tune(
    model: Any,
    ids: Tensor,
    unseen: Tensor,
    needles: Needles,
    stages: list[Stage],
    seed: int,
    on_stage: Callable[[], object],
) -> dict[str, Any]:
    """Teach the model the task, a stage after another; return what is to be told of it."""
    torch.manual_seed(seed)
    log: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "training_tokens": len(ids),
        "held_out_tokens": len(unseen),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "stages": [],
    }
    for number, stage in enumerate(stages):
        began = time.perf_counter()
        data = mixture(ids, needles, stage, seed + number)
        # On a CPU its gradient is faster than sdpa's for short rows.
        model.set_attn_implementation("eager" if stage.context <= CONTEXT else "sdpa")
        losses, unseen_by_step = run(
            model,
            data,
            unseen[:WATCHED],
            stage.context,
            stage.steps,
            muon_lr=MUON_LR,
            adam_lr=MUON_LR / 10,
            name=f"{stage.context} tokens",
            loss_of=loss_of,
            compiled=False,  # so few steps would not pay for it
        )
        log["stages"].append(
            {
                **stage._asdict(),
                "losses": losses,
                "held_out_perplexity_by_step": unseen_by_step,
                "minutes": (time.perf_counter() - began) / 60,
            }
        )
        on_stage()
    log["held_out_perplexity"] = {n: perplexity(model, unseen, n) for n in (CONTEXT, CONTEXT * FACTOR)}
    return log


if __name__ == "__main__":
    sys.exit(main())
