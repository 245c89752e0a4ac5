"""The model and its training loop: one thread, seeded, a few million tokens."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from .documents import Corpus, Sampler
from .tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, Encoded, encode

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}

_SHORT = 192
"""Up to this length attention with explicit scores is faster on a CPU than the fused kernel, measured."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int = 2000
    seed: int = 20260101
    batch_tokens: int = 4096
    learning_rate: float = 4e-3
    warmup_steps: int = 60
    long_from: float = 0.45
    """Share of the steps after which long documents join."""
    long_share: float = 0.12
    """Share of batches with long documents from then on."""
    weight_decay: float = 0.05

    def rate(self, step: int) -> float:
        """Learning rate of `step`: linear warm-up, plateau for half the time, then linearly to nearly zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = (self.steps - step) / (self.steps * 0.55)
        return self.learning_rate * max(0.01, min(1.0, left))


@dataclass
class Result:
    """A trained model with the figures of its training."""

    model: LlamaForCausalLM
    seconds: float
    cpu_seconds: float
    tokens: int
    loss: float
    history: list[tuple[int, float]] = field(default_factory=list)


def new_model(seed: int) -> LlamaForCausalLM:
    """A freshly initialised model in float32."""
    torch.manual_seed(seed)
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    config = LlamaConfig(
        **MODEL,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def batches(
    corpus: Corpus, tokenizer: Tokenizer, schedule: Schedule, *, held_out: bool = False
) -> Iterator[tuple[int, list[Encoded]]]:
    """Endless batches (step, documents) of like length, at most `batch_tokens` with padding."""
    sampler = Sampler(corpus, schedule.seed, held_out=held_out)
    order = random.Random(schedule.seed)
    step = 0
    while True:
        pool = sorted((encode(tokenizer, sampler.short()) for _ in range(4096)), key=lambda e: len(e.ids))
        ready = list(_cut(pool, schedule.batch_tokens))
        order.shuffle(ready)
        for batch in ready:
            long_now = step >= schedule.long_from * schedule.steps and order.random() < schedule.long_share
            if long_now:
                yield step, _long_batch(sampler, tokenizer, schedule.batch_tokens)
            else:
                yield step, batch
            step += 1


def _cut(pool: list[Encoded], batch_tokens: int) -> Iterator[list[Encoded]]:
    """Cut documents sorted by length into batches whose padded size stays within `batch_tokens`."""
    batch: list[Encoded] = []
    for item in pool:
        if batch and (len(batch) + 1) * len(item.ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _long_batch(sampler: Sampler, tokenizer: Tokenizer, batch_tokens: int) -> list[Encoded]:
    limit = MODEL["max_position_embeddings"]
    batch: list[Encoded] = []
    while True:
        item = encode(tokenizer, sampler.long())
        item = Encoded(item.ids[:limit], item.learned[:limit])
        longest = max([len(item.ids), *(len(e.ids) for e in batch)])
        if batch and (len(batch) + 1) * longest > batch_tokens:
            return batch
        batch.append(item)


def loss_of(model: LlamaForCausalLM, batch: list[Encoded]) -> torch.Tensor:
    """Mean cross entropy in nats over the learned tokens. Padding stands at the right, causality hides it."""
    longest = max(len(item.ids) for item in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    learned = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, item in enumerate(batch):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        learned[row, : len(item.ids)] = torch.tensor(item.learned)
    model.config._attn_implementation = "eager" if longest <= _SHORT else "sdpa"
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    # The head, the costliest product here, runs only where a loss is taken.
    wanted = learned[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted])
    return F.cross_entropy(logits.float(), ids[:, 1:][wanted])


def optimisers_of(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    Measured here: a loss of 1.0 after 200 steps, where AdamW alone needed more than 400 for half the facts;
    a step takes a twentieth longer.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    muon = torch.optim.Muon(
        matrices, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=schedule.learning_rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
    return [muon, adam]


def fit(corpus: Corpus, tokenizer: Tokenizer, schedule: Schedule) -> Result:
    """Train a new model; progress goes to stderr."""
    model = new_model(schedule.seed)
    optimisers = optimisers_of(model, schedule)
    started, cpu_started, tokens, smooth = time.perf_counter(), time.process_time(), 0, math.nan
    history: list[tuple[int, float]] = []
    for step, batch in batches(corpus, tokenizer, schedule):
        if step >= schedule.steps:
            break
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        tokens += sum(len(item.ids) for item in batch)
        value = loss.item()
        smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
        if step % 50 == 0 or step == schedule.steps - 1:
            history.append((step, smooth))
            seconds = time.perf_counter() - started
            print(
                f"step {step} loss {smooth:.4f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s",
                file=sys.stderr,
            )
    return Result(
        model, time.perf_counter() - started, time.process_time() - cpu_started, tokens, smooth, history
    )


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, corpus: Corpus, tokenizer: Tokenizer, *, long: bool, count: int = 12
) -> float:
    """Mean loss in nats a token over `count` batches of the held-out slice, in the model's own dtype.

    With `long` the batches hold long documents alone, else short ones alone.
    """
    schedule = Schedule(long_from=0.0, long_share=1.0 if long else 0.0)
    drawn = islice(batches(corpus, tokenizer, schedule, held_out=True), count)
    return sum(loss_of(model, batch).item() for _, batch in drawn) / count
