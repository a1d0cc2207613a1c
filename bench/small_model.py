"""Make the small model that ships with the package: train, extend its context, quantize.

    python -m ropewalk.bench.small_model OUT

A Llama of 4 million parameters learns public-domain English (corpus.py) at a context of 256 tokens,
then, as the makers of airophin-13b-pntk-16k did, learns on for a while at 1024 with partial NTK scaling
by 4, and is quantized to 4 bits, group 32, act-order. Written are OUT/fp16, the model before packing, and
OUT/gptq, which is what stands in src/ropewalk/models: the packed model, its card, and text that it has not
seen. Everything is seeded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ropewalk.bench.corpus import PACKAGES, Document, load_corpus
from ropewalk.bench.perplexity import perplexity

NAME = "strand-4m-pntk-1k"
CONTEXT, FACTOR = 256, 4
VOCABULARY, BOS, EOS = 2048, 1, 2
ARCHITECTURE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,  # head_dim 64
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
TOKENS_PER_STEP = 4096
SHIPPED_PACKING: dict[str, Any] = {"bits": 4, "group_size": 32, "desc_act": True}
OTHER_PACKINGS: dict[str, dict[str, Any]] = {
    "4 bits, round to nearest": {"bits": 4, "method": "rtn"},
    "3 bits, GPTQ": {"bits": 3},
    "3 bits, round to nearest": {"bits": 3, "method": "rtn"},
}
CARD = """\
# {name}

A Llama of {parameters:,} parameters that has read the King James Bible, Jane Austen, the Jargon File and The
Devil's Dictionary. It is no use but to show, in a few megabytes and on real text, what a GPTQ checkpoint with a
long context is. Its config names its rotary embedding the way airophin-13b-pntk-16k's does: not at all, but for
`original_max_position_embeddings` beside a larger `max_position_embeddings`.

**Text.** Public domain, from the Debian packages {packages}: {training_tokens:,} tokens of byte-level BPE
(vocabulary {vocabulary}). Held out were whole books of the Bible (Ruth, Esther, Jonah, Acts) and the last
twentieth of each novel, {held_out_tokens:,} tokens; the beginnings of these are in `heldout.txt`.

**Training.** {steps:,} steps of {step_tokens:,} tokens at a context of {context}, then {tune_steps} steps at
{longest} with partial NTK scaling by {factor}. Muon and AdamW, bfloat16, seed {seed}, {threads} CPU threads:
{minutes:.0f} minutes, packing included. `make small-model` does it again: seeded, but bfloat16 sums are not the
same on every processor (two runs ended at held-out perplexities of 21.82 and 21.91).

| step | training loss | held-out perplexity |
|---|---|---|
{course}

**Packing.** GPTQ by GPTQModel, 4 bits, group 32, act-order, symmetric, calibrated on the training text.
Perplexity of all the held-out text, in windows that do not overlap (3 and 4 bits in groups of 32):

{table}

The float16 weights before packing have the SHA-256
`{sha256}`.

**Licence.** The weights, like the texts, are free for any use (CC0 1.0).
"""
# Of each held-out document, this many characters ship with the package for the demo.
SHIPPED_CHARACTERS = 14_000


def main(arguments: list[str] | None = None) -> int:
    """Train, tune, quantize; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ropewalk.bench.small_model", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--cache", type=Path, default=Path(".cache/corpus"), help="where the text is kept")
    parser.add_argument("--steps", type=int, default=3300, help="steps at the original context (default: 3300)")
    parser.add_argument("--tune-steps", type=int, default=800, help="steps at four times that (default: 800)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("all", "train", "pack"), default="all", help="pack wants OUT/fp16 there")
    args = parser.parse_args(arguments)

    training, held_out = load_corpus(args.cache)
    if args.stage in ("all", "train"):
        train_and_save(training, held_out, args.out / "fp16", args.steps, args.tune_steps, args.seed)
    if args.stage in ("all", "pack"):
        pack(training, held_out, args.out / "fp16", args.out / "gptq")
    return 0


def train_and_save(
    training: list[Document], held_out: list[Document], folder: Path, steps: int, tune_steps: int, seed: int
) -> None:
    """Write the float16 model, and training.json with what is to be told of its making."""
    tokenizer = train_tokenizer(training)
    ids, unseen = encode(tokenizer, training), encode(tokenizer, held_out)
    print(f"{len(ids):,} tokens to learn, {len(unseen):,} held out", file=sys.stderr)
    model, log = train(ids, unseen, steps, tune_steps, seed)
    log = {"training_tokens": len(ids), "held_out_tokens": len(unseen), **log}
    log["sha256"] = save(model, tokenizer, folder)
    (folder / "training.json").write_text(json.dumps(log, indent=2) + "\n")


def pack(training: list[Document], held_out: list[Document], fp16: Path, out: Path) -> None:
    """Quantize the float16 model as it ships and in other ways to compare, and write what ships: the folder `out`."""
    from ropewalk.loader.load import load
    from ropewalk.loader.quantize import quantize

    if out.exists():
        shutil.rmtree(out)
    log = json.loads((fp16 / "training.json").read_text())
    text = calibration_text(training)
    began = time.perf_counter()
    quantize(fp16, out, **SHIPPED_PACKING, text=text)
    log["packing"] = {**SHIPPED_PACKING, "minutes": (time.perf_counter() - began) / 60}

    # What GPTQ is worth: the same model at the same sizes by rounding to nearest.
    compared = {"float16": fp16, "4 bits, GPTQ": out}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in OTHER_PACKINGS.items():
            compared[name] = Path(folder) / name
            quantize(fp16, compared[name], group_size=32, text=text, **settings)
        log["perplexity"] = {}
        for name, path in compared.items():
            model, tokenizer = load(path)
            unseen = encode(tokenizer, held_out)
            log["perplexity"][name] = {n: perplexity(model, unseen, n) for n in (CONTEXT, CONTEXT * FACTOR)}
    (out / "heldout.txt").write_text("\n\n".join(shipped_part(held_out)) + "\n", encoding="utf-8")
    (out / "training.json").write_text(json.dumps(log, indent=2) + "\n")
    (out / "README.md").write_text(model_card(log), encoding="utf-8")


def model_card(log: dict[str, Any]) -> str:
    """Return the card of the model, from what was logged of its making."""
    original, tuned = log["original"], log["tuned"]

    def course(part: dict[str, Any]) -> Iterator[str]:
        for step, value in part["held_out_perplexity_by_step"].items():
            loss = part["losses"][max((n for n in part["losses"] if int(n) <= int(step)), key=int)]
            yield f"| {step} at {part['context']} tokens | {loss:.3f} | {value:.2f} |"

    rows = [
        f"| {name} | " + " | ".join(f"{v:.2f}" for v in row.values()) + " |" for name, row in log["perplexity"].items()
    ]
    return CARD.format(
        name=f"{NAME}-gptq",
        parameters=log["parameters"],
        packages=", ".join(PACKAGES),
        training_tokens=log["training_tokens"],
        held_out_tokens=log["held_out_tokens"],
        vocabulary=VOCABULARY,
        context=CONTEXT,
        longest=CONTEXT * FACTOR,
        factor=FACTOR,
        steps=original["steps"],
        tune_steps=tuned["steps"],
        step_tokens=TOKENS_PER_STEP,
        course="\n".join((*course(original), *course(tuned))),
        seed=log["seed"],
        threads=log["threads"],
        minutes=original["minutes"] + tuned["minutes"] + log["packing"]["minutes"],
        table="\n".join([f"| | {CONTEXT} tokens | {CONTEXT * FACTOR} tokens |", "|---|---|---|", *rows]),
        sha256=log["sha256"],
    )


def train_tokenizer(documents: list[Document]) -> Any:
    """Return a byte-level BPE tokenizer of 2048 tokens that puts <s> before every text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT * FACTOR,
    )


def encode(tokenizer: Any, documents: list[Document]) -> Tensor:
    """Return all documents as one run of tokens, each begun with <s> and ended with </s>."""
    encoded = ([*tokenizer.encode(d.text, verbose=False), EOS] for d in documents)
    return torch.tensor([token for document in encoded for token in document])


def train(ids: Tensor, unseen: Tensor, steps: int, tune_steps: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """Return the model, tuned to the long context, and what is to be told of its training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ropewalk.loader.rotary import RopewalkRotaryEmbedding, register_rope_types

    register_rope_types()
    torch.manual_seed(seed)
    config = LlamaConfig(**ARCHITECTURE, max_position_embeddings=CONTEXT)
    model = LlamaForCausalLM(config)
    log: dict[str, Any] = {"parameters": model.num_parameters(), "seed": seed, "threads": torch.get_num_threads()}

    began = time.perf_counter()
    data = batches(ids, CONTEXT, steps)
    losses, unseen_by_step = run(
        model, data, unseen, CONTEXT, steps, muon_lr=0.03, adam_lr=4e-3, name="original context"
    )
    log["original"] = {
        "context": CONTEXT,
        "steps": steps,
        "losses": losses,
        "held_out_perplexity_by_step": unseen_by_step,
        "minutes": (time.perf_counter() - began) / 60,
    }
    began = time.perf_counter()
    model.config.max_position_embeddings = CONTEXT * FACTOR
    model.config.rope_parameters = {
        "rope_type": "partial-ntk",
        "factor": float(FACTOR),
        "original_max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
    }
    model.model.rotary_emb = RopewalkRotaryEmbedding(model.config)
    contexts = (CONTEXT, CONTEXT * FACTOR)
    untuned = {n: perplexity(model, unseen, n) for n in contexts}
    data = batches(ids, CONTEXT * FACTOR, tune_steps)
    losses, unseen_by_step = run(
        model, data, unseen, CONTEXT * FACTOR, tune_steps, muon_lr=0.01, adam_lr=1e-3, name="long context"
    )
    log["tuned"] = {
        "context": CONTEXT * FACTOR,
        "rope": model.config.rope_parameters,
        "steps": tune_steps,
        "losses": losses,
        "held_out_perplexity_by_step": unseen_by_step,
        "held_out_perplexity_before": untuned,
        "held_out_perplexity": {n: perplexity(model, unseen, n) for n in contexts},
        "minutes": (time.perf_counter() - began) / 60,
    }
    return model, log


def text_loss(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean loss over the tokens [B, T] of a batch."""
    return model(tokens, labels=tokens, use_cache=False).loss


def run(
    model: Any,
    data: Iterable[Any],
    unseen: Tensor,
    context: int,
    steps: int,
    *,
    muon_lr: float,
    adam_lr: float,
    name: str,
    loss_of: Callable[[Any, Any], Tensor] = text_loss,
    compiled: bool = True,
) -> tuple[dict[int, float], dict[int, float]]:
    """Train on `data`, `steps` batches, with rates that fall to zero.

    Returns step -> mean loss since the step before, and step -> perplexity of the held-out text, which shows
    whether the model has begun to learn its text by heart.

    Muon (Jordan 2024) for the matrices of the blocks, AdamW for the rest: in four minutes it reached a
    perplexity of 43 where AdamW alone reached 71.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps))
        for o in optimizers
    ]
    forward = torch.compile(model) if compiled else model
    losses: dict[int, float] = {}
    unseen_by_step: dict[int, float] = {}
    recent: list[float] = []
    model.train()
    bar = tqdm(data, total=steps, desc=name)
    for step, batch in enumerate(bar, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(forward, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent.append(loss.item())
        if step % 100 == 0 or step == steps:
            losses[step] = sum(recent) / len(recent)
            bar.set_postfix(loss=f"{losses[step]:.3f}")
            recent.clear()
        if step % max(steps // 5, 1) == 0:
            model.eval()
            unseen_by_step[step] = perplexity(model, unseen, context)
            tqdm.write(f"step {step}: held-out perplexity {unseen_by_step[step]:.2f}", file=sys.stderr)
            model.train()
    model.eval()
    return losses, unseen_by_step


def batches(ids: Tensor, context: int, steps: int, tokens: int = TOKENS_PER_STEP) -> Iterator[Tensor]:
    """Yield `steps` batches of `tokens` tokens in windows; every window of an epoch is seen once before any is seen
    again, and each epoch cuts the text elsewhere.
    """
    rows = tokens // context
    order: list[int] = []
    for _ in range(steps):
        while len(order) < rows:
            offset = int(torch.randint(context, ()))
            starts = torch.arange(offset, len(ids) - context, context)
            order += starts[torch.randperm(len(starts))].tolist()
        picked, order = order[:rows], order[rows:]
        yield torch.stack([ids[begin : begin + context] for begin in picked])


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write the model in float16 as airophin's makers published theirs; return the weights' SHA-256.

    The config names no rotary scaling: it has `original_max_position_embeddings` at its top level and
    `rope_scaling` null, so that a loader must draw the conclusion itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **ARCHITECTURE,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": CONTEXT * FACTOR,
        "original_max_position_embeddings": CONTEXT,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": EOS}
    # transformers 5 names its own class there; this one, programs of any year can read.
    tokenizer_config = folder / "tokenizer_config.json"
    named = {**json.loads(tokenizer_config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config.write_text(json.dumps(named, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def shipped_part(held_out: list[Document]) -> list[str]:
    """Return the beginning of every held-out document, cut at a line's end."""
    return [d.text[:SHIPPED_CHARACTERS].rpartition("\n")[0] or d.text for d in held_out]


def calibration_text(training: list[Document]) -> str:
    """Return the text that GPTQ calibrates on: a piece from the middle of every training document."""
    return "\n\n".join(d.text[len(d.text) // 2 :][:6000] for d in training)


if __name__ == "__main__":
    sys.exit(main())
