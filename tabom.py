# SPDX-License-Identifier: MIT
"""TABOM in one file: train a masked diffusion language model on the order in which it decodes.

Such a model is trained on uniformly random masks but decodes from easy to hard, so training and
inference visit different states.  TABOM (Self-Distilled Trajectory-Aware Boltzmann Modeling, arXiv
2605.11854; this file is unofficial) trains on the states of the model's own decoding:

    1. pretrain a denoiser as usual: hide random tokens, predict them              (Eq. 1)
    2. let it answer queries, and record when each position was revealed           (Eq. 2, Def. 1)
    3. keep those that a checker accepts: rollouts[correct]; the checker is yours
    4. replay a state of a trajectory, train on the tokens that came next          (Eq. 9, term 1)
    5. and rank: what was revealed earlier should have the lower entropy           (Eq. 7-8)

    python tabom.py --demo            all of it on arithmetic, beside rivals and controls
    python tabom.py --demo --quick    the same chain in a minute or two, to see that it runs

Sections 1-8 are the method; they need torch and a callable `model(tokens) -> logits`, no more.
Then rivals, and the demo; its problems, their checker and its tables are in toy_data.py.

A rollout is a response that the model has decoded; with the rank at which each position was
revealed (written) it is a trajectory.  A cut is the state on its way that is replayed, the window
the W tokens that were revealed next.  Entropies are in nats.  Shapes: B sequences, L prompt tokens,
N response tokens, n of them decoded, V vocabulary, D width.  x_t is a response, partly [MASK].
Simplified: 0.3 million parameters, arithmetic instead of language; all weights are fine-tuned
(paper: LoRA); a window's entropies are all measured at the cut (Eq. 5: each before its reveal).
"""
# ==== The method begins here: sections 1-8 are one block to copy; they need nothing but torch =====
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# == 1. A trajectory: one rank per position ========================================================
# A trajectory is a response and, for each position, the rank at which it was revealed.  From these
# integers every state on the way can be rebuilt; no masks need to be stored.

@dataclass(frozen=True)
class Trajectories:
    """Decoded responses that remember the order in which they were written (Def. 1).
    prompt (B, L) and response (B, N), int64 tokens
    decode_rank (B, N) int64: 0 = revealed first; in each row a permutation of 0 .. n-1 over the n
                positions that were decoded, and -1 at the others.  The others keep what `response`
                holds (a given token, padding, mask_id), are never trained, ranked or counted.
    entropy     (B, N) float, nats, of each position just before it was revealed.  It orders what
                one step has revealed; the losses measure entropies anew.
    A wrong shape or dtype raises ValueError; `validate` looks at the values, too.
    """
    prompt: Tensor
    response: Tensor
    decode_rank: Tensor
    entropy: Tensor

    def __post_init__(self):
        shapes = [tuple(field.shape) for field in vars(self).values()]
        require(all(len(shape) == 2 for shape in shapes) and len({b for b, _ in shapes}) == 1
                and len({n for _, n in shapes[1:]}) == 1,
                f"prompt must be (B, L) and the other three fields (B, N), not {shapes}.")
        dtypes = [field.dtype for field in vars(self).values()]
        require(set(dtypes[:3]) == {torch.int64} and self.entropy.is_floating_point(),
                f"prompt, response, decode_rank must be int64, entropy floating-point: {dtypes}.")

    @classmethod
    def cat(cls, parts):
        """Several batches of one L and N as one."""
        lengths = [(part.prompt.shape[1], part.response.shape[1]) for part in parts]
        require(len(set(lengths)) == 1, "cat needs at least one part, and the same prompt and "
                f"response lengths (L, N) in all, not {lengths}.")
        return cls(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))

    def __getitem__(self, rows):
        """Rows by boolean mask, index tensor or slice."""
        return Trajectories(*(field[rows] for field in vars(self).values()))

    def __len__(self):
        return len(self.response)

    def to(self, device):
        return Trajectories(*(field.to(device) for field in vars(self).values()))

    def only(self, keep):
        """Leave out the positions where keep (B, N) is False, for example padding.  They stay as
        they are, visible; write mask_id there if the model should not see them."""
        rank = ranks_from_steps(self.decode_rank.masked_fill(~keep, -1), self.entropy)
        return replace(self, decode_rank=rank, entropy=self.entropy.masked_fill(~keep, 0))

    @property
    def n_decoded(self):
        return (self.decode_rank >= 0).sum(1)    # (B,) n

def require(fact, message):
    if not fact:
        raise ValueError(message)

def require_whole(name, value, lowest):
    require(hasattr(value, "__index__") and not isinstance(value, Tensor) and value >= lowest,
            f"{name} must be a whole number of at least {lowest}, not {value}.")

def rank_in_row(values):
    """(B, N) -> (B, N) int64: 0 for the smallest of a row; of equal ones the leftmost is first."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)

def ranks_from_steps(step, entropy):
    """(B, N) step of each reveal, -1 = never -> decode_rank.  Ties: by entropy, then position.
    Steps 2 0 -1 0 with entropies .3 .9 .1 .4 give ranks 2 1 -1 0."""
    by_entropy = entropy.argsort(dim=1, stable=True)                     # positions, surest first
    step_or_max = step.masked_fill(step < 0, torch.iinfo(step.dtype).max)
    by_step = step_or_max.gather(1, by_entropy).argsort(dim=1, stable=True)   # ties: as by entropy
    return by_entropy.gather(1, by_step).argsort(dim=1).masked_fill(step < 0, -1)

def segment_masks(decode_rank, n_visible, window_size=1):
    """Cut each trajectory after `n_visible` reveals -> masked, window: (B, N) bool.

    n_visible: an int or (B,).  masked is the paper's M_t; window, its Delta, holds the next
    `window_size` ranks, or the fewer that are left near the end."""
    require_whole("window_size", window_size, 1)
    if isinstance(n_visible, Tensor):
        require(n_visible.shape == decode_rank.shape[:1],
                f"n_visible must have the shape ({len(decode_rank)},).")
        n_visible = n_visible[:, None]                                   # (B, 1)
    else:
        require_whole("n_visible", n_visible, 0)
    masked = (decode_rank >= 0) & (decode_rank >= n_visible)
    window = masked & (decode_rank - n_visible < window_size)
    return masked, window

def response_logits(model, prompt, x_t, at=None):
    """The only call of a model: x_t (B, N) -> logits, of all positions or only of `at` (B, W).
    logits[:, i] must predict token i (Dream's predicts i + 1: shift it).  Left-padded prompts:
    attend where (tokens != pad_id).cumsum(1) > 0, which shows EOS in a response if pad is EOS."""
    tokens = torch.cat([prompt, x_t], 1)
    require(len(tokens) > 0, "there are no rows to show to the model: did the checker keep any?")
    logits = model(tokens)                                               # (B, L+N, V)
    require(isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == tokens.shape,
            f"the model must return a tensor of logits {(*tokens.shape, 'V')} (output.logits).")
    if at is None:
        return logits[:, prompt.shape[1]:]                               # (B, N, V)
    return logits[torch.arange(len(at), device=at.device)[:, None], prompt.shape[1] + at]

def masked_logits(model, trajectories, masked, counted, mask_id, at=None):
    """Hide the positions `masked` (B, N) and predict -> logits (B, N, V), or (B, W, V) of `at`.
    counted (B, N), or (B, W) with `at`: the positions that a loss uses.  Logits of others may be
    nan or -inf; they are overwritten, so that none reaches a loss or a gradient."""
    x_t = trajectories.response.masked_fill(masked, mask_id)
    logits = response_logits(model, trajectories.prompt, x_t, at)
    lowest = torch.finfo(logits.dtype).min       # of a row of only -inf, log_softmax would be nan
    return ban_mask(logits, mask_id, lowest).masked_fill(~counted[:, :, None], lowest)

def ban_mask(logits, mask_id, low=-torch.inf):
    """If the vocabulary has an entry for [MASK], make it impossible: no response contains it."""
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(is_mask, low)

def row_mean(values, chosen):
    """(B, N), (B, N) bool -> (B,): mean over the chosen positions of a row, 0 without any."""
    return torch.where(chosen, values, 0).sum(1) / chosen.sum(1).clamp(min=1)

def draw_below(limit, generator):
    """(B,) limits -> (B,) int64, each uniform over 0 .. limit-1."""
    draw = torch.rand(limit.shape, generator=generator, device=limit.device, dtype=torch.float32)
    return (draw * limit).long()

# == 2. Predictive entropy: how unsure the model is of a position ==================================
# The decoder sorts by it, the ranking loss compares it, the discrimination score is its spread.

def predictive_entropy(logits):
    """H = -sum_v p(v) log p(v) over the whole vocabulary: (..., V) -> (...) float32, nats.
    An entry of -inf is a banned token and contributes exactly 0, also to the gradient."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    log_p = log_p.clamp(min=torch.finfo(torch.float32).min)              # 0 * -inf would be nan
    return -(log_p.exp() * log_p).sum(-1)

# == 3. Decode from easy to hard, and remember the order (Eq. 2, Def. 1) ===========================
# Start fully masked; at each step ask the model about every masked position and write the surest.
# Noting the step of each position is all it takes to record a trajectory.

def by_confidence(logits, tokens):
    """As in LLaDA: the highest top probability first.  -> difficulty (B, N), lowest first"""
    return -logits.softmax(-1, dtype=torch.float32).amax(-1)

def by_margin(logits, tokens):
    """An order: the largest gap between the two likeliest tokens first."""
    require(logits.shape[-1] > 1, "order 'margin' needs a vocabulary of two tokens or more.")
    best, second = logits.softmax(-1, dtype=torch.float32).topk(2).values.unbind(-1)
    return second - best

MEASURES = {"confidence": by_confidence, "margin": by_margin}
ORDERS = ("entropy", *MEASURES, "random")

def pick_tokens(logits, temperature, generator):
    """(..., V) -> (...): the likeliest tokens, or samples if the temperature is above 0: with E
    drawn from an exponential distribution, the argmax of p / E is a sample of p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)

@torch.no_grad()
def decode(model, prompt, response_length, *, mask_id, order="entropy", order_temperature=0.0,
           tokens_per_step=1, temperature=0.0, block_length=None, generator=None, given=None,
           decodable=None):
    """Answer prompts (B, L) -> `Trajectories` with responses of `response_length` = N tokens.

    order            what counts as easy: the lowest "entropy" (Eq. 2), the highest top probability
                     ("confidence"), the largest gap between the top two ("margin"), "random", a
                     tensor (N,) or a function (logits (B, N, V), tokens (B, L+N)) -> (B, N), lowest
                     first.  Of equal ones the leftmost.
    order_temperature  above 0 a position is drawn with odds exp(-difficulty / order_temperature):
                     Eq. 3 for one step, with beta = 1 / order_temperature
    tokens_per_step  positions revealed per forward pass, ranked among themselves by entropy
    temperature      0 is greedy.  It changes which token a step writes, not at which position.
    block_length     finish a block of positions before the next (semi-autoregressive, as LLaDA)
    generator        seeds all that is drawn; on the device of the prompt
    given            (B, N) int64, for infilling: tokens that stay, and `mask_id` where to decode
    decodable        (B, N) bool: positions that are False keep what they hold, [MASK] or given
    Call model.eval() first.  A row with nothing to decode stays as it is.  Raises ValueError."""
    shape, device = (len(prompt), response_length), prompt.device
    block_length = response_length if block_length is None else block_length
    check_decoding(prompt, shape, mask_id, order, order_temperature, tokens_per_step, temperature,
                   block_length, given, decodable)
    if isinstance(order, Tensor):
        if order_temperature == 0:               # float32, below, would merge large integers
            order = rank_in_row(order[None])[0]
        fixed = order.to(device).expand(shape)
        order = lambda logits, tokens: fixed
    order = MEASURES.get(order, order) if isinstance(order, str) else order
    response = prompt.new_full(shape, mask_id) if given is None else given.clone()
    masked = response == mask_id                 # tracked: undecodable positions may hold [MASK]
    masked = masked if decodable is None else masked & decodable
    step_of = torch.full_like(response, -1)
    reveal_entropy = torch.zeros(shape, device=device, dtype=torch.float32)
    block = torch.arange(response_length, device=device) // block_length           # (N,)
    for step in range(response_length):
        if not masked.any():
            break
        logits = ban_mask(response_logits(model, prompt, response), mask_id)       # (B, N, V)
        entropy = difficulty = predictive_entropy(logits)                # (B, N)
        if order == "random":
            difficulty = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        elif order != "entropy":
            difficulty = order(logits, torch.cat([prompt, response], 1)).float()
            require(difficulty.shape == shape and difficulty[masked].isfinite().all(),
                    f"the order must give finite numbers, {shape}; or were the logits nan?")
        if order_temperature > 0:                # Gumbel: odds exp(-difficulty / order_temperature)
            noise = torch.empty_like(difficulty).exponential_(generator=generator).log()
            difficulty = difficulty + order_temperature * noise
        current_block = torch.where(masked, block, response_length).amin(1, keepdim=True)
        candidates = masked & (block == current_block)
        place = rank_in_row(difficulty.masked_fill(~candidates, torch.inf))
        chosen = candidates & (place < tokens_per_step)                  # Eq. 2
        response[chosen] = pick_tokens(logits[chosen], temperature, generator)
        step_of[chosen], reveal_entropy[chosen] = step, entropy[chosen]
        masked = masked & ~chosen
    require(reveal_entropy.isfinite().all() and not masked.any(), "the logits were nan or +inf.")
    return Trajectories(prompt, response, ranks_from_steps(step_of, reveal_entropy), reveal_entropy)

def check_decoding(prompt, shape, mask_id, order, order_temperature, tokens_per_step, temperature,
                   block_length, given, decodable):
    """Raise ValueError for a wrong argument of `decode`, before the model runs."""
    for name, value, lowest in (("response_length", shape[1], 1), ("mask_id", mask_id, 0),
                                ("tokens_per_step", tokens_per_step, 1),
                                ("block_length", block_length, 1)):
        require_whole(name, value, lowest)
    if isinstance(order, Tensor):
        require(order.shape == shape[1:] and order.isfinite().all(),
                f"an order tensor must hold {shape[1]} finite numbers.")
    else:
        require(callable(order) or order in ORDERS,
                f"order must be one of {', '.join(ORDERS)}, a tensor or a function.")
    for name, value in (("temperature", temperature), ("order_temperature", order_temperature)):
        require(0 <= value < float("inf"), f"{name} must be 0 or more, not {value}.")
    require(prompt.dim() == 2 and prompt.dtype == torch.int64, "the prompt must be (B, L) int64.")
    require(not (prompt == mask_id).any(), f"the prompt contains mask_id ({mask_id}).")
    for name, field, dtype in (("given", given, torch.int64), ("decodable", decodable, torch.bool)):
        require(field is None or (field.shape == shape and field.dtype == dtype),
                f"{name} must have the shape {shape} and be {dtype}.")

# == 4. The ranking loss (Eq. 7-8) =================================================================
# Boltzmann: ideally a set of revealed tokens has a probability proportional to exp(-beta * sum of
# their entropies, each before its reveal).  Reveal one more token, r or s: the normaliser cancels,
# the two sets have the ratio exp(-beta (h(r) - h(s))).  If r was revealed first, its set should be
# the likelier one: h(r) < h(s) (Lemma 1), by a margin gamma in nats, of which beta is part.  At a
# cut the next token is usually the surest already; what is taught is the order of later ones.

def pairwise_rank_loss(entropy, decode_rank, window, margin):
    """Eq. 8: mean over the window's pairs of max(0, h(r) - h(s) + margin), then over rows.

    h = entropy (B, N) nats; decode_rank (B, N); window (B, N) bool; margin (gamma) nats.
    A pair (r, s) has r revealed before s; a row without a pair counts 0.  Returns loss and
    pair_accuracy, the detached share of pairs with h(r) < h(s); chance is 0.5."""
    shapes = [tuple(tensor.shape) for tensor in (entropy, decode_rank, window)]
    require(len(set(shapes)) == 1, f"entropy, decode_rank, window need one shape, not {shapes}.")
    require(len(entropy) > 0, "there are no rows to rank.")
    require(0 <= margin < float("inf"), f"margin must be 0 nats or more, not {margin}.")
    pairs = window[:, :, None] & window[:, None, :]                      # (B, N, N)
    pairs &= decode_rank[:, :, None] < decode_rank[:, None, :]           # pairs[b, earlier, later]
    excess = entropy[:, :, None] - entropy[:, None, :]                   # h(r) - h(s)
    loss = row_mean((excess + margin).relu().flatten(1), pairs.flatten(1)).mean()      # Eq. 8
    pair_accuracy = ((excess < 0) & pairs).sum() / pairs.sum().clamp(min=1)
    return loss, pair_accuracy

# == 5. TABOM (Eq. 9) ==============================================================================
# Show exactly what had been revealed before a random cut of a recorded trajectory.  Then teach two
# things about the tokens that came next: *what* they are, and *in which order* they came.

def token_nll(logits, tokens):
    """-log p of each token: (B, W, V), (B, W) -> (B, W) float32, nats."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    return -log_p.gather(-1, tokens[..., None]).squeeze(-1)

def tabom_loss(model, trajectories, *, mask_id, generator=None, window_size, margin, rank_weight,
               n_visible=None):
    """Eq. 9: cross-entropy of the window + rank_weight (lambda) * its ranking loss, averaged.

    window_size in tokens; margin in nats; n_visible (B,): where to cut, by default drawn from
    0 .. n-1.  If `decode` revealed k tokens per step (no blocks), pass multiples of k: the states
    that it visited.  Raises ValueError for a setting out of range.  Returns loss, metrics.
    """
    for name, value in (("margin", margin), ("rank_weight", rank_weight)):
        require(0 <= value < float("inf"), f"{name} must be 0 or more, not {value}.")
    response, decode_rank = trajectories.response, trajectories.decode_rank
    if n_visible is None:
        n_visible = draw_below(trajectories.n_decoded, generator)
    masked, window = segment_masks(decode_rank, n_visible, window_size)
    # The window's positions (_w) in the order of reveal; behind a short one window_w is False.
    at = decode_rank.masked_fill(~window, response.shape[1]).argsort(1)[:, :window_size]   # (B, W)
    rank_w, window_w, tokens_w = (x.gather(1, at) for x in (decode_rank, window, response))
    logits = masked_logits(model, trajectories, masked, window_w, mask_id, at)     # (B, W, V)
    tokens_w = tokens_w.masked_fill(~window_w, 0)          # not counted; mask_id may have no logit
    nll = row_mean(token_nll(logits, tokens_w), window_w).mean()
    entropy = predictive_entropy(logits)         # at the cut; in Eq. 5 each just before its reveal
    rank_loss, pair_accuracy = pairwise_rank_loss(entropy, rank_w, window_w, margin)
    loss = nll + rank_weight * rank_loss                                 # Eq. 9
    return loss, {"nll": nll.detach(), "rank_loss": rank_loss.detach(),
                  "pair_accuracy": pair_accuracy}

# == 6. Training as usual: uniform masking (Eq. 1) =================================================
# What comes before TABOM.  Hide a random share of the response and predict it: the NELBO, negative
# evidence lower bound.  It trains on any visible set; the decoder visits few, easy-to-hard ones.

def nelbo_loss(model, trajectories, *, mask_id, generator=None, mask_ratio=None):
    """Eq. 1: mean over the masked positions of a row, then over rows; the order is not used.
    (LLaDA divides the sum over the masked positions by the mask ratio instead.)

    Each row draws a mask ratio from 0 .. 1, unless `mask_ratio` sets it for all, and masks each
    decoded position with that probability, but at least one.  Returns loss, metrics."""
    require(0 <= (mask_ratio or 0) <= 1, f"mask_ratio must be from 0 to 1, not {mask_ratio}.")
    response, decoded = trajectories.response, trajectories.decode_rank >= 0
    draw = torch.rand(len(response), 1 + response.shape[1], generator=generator,
                      device=response.device, dtype=torch.float32)       # ratio, then positions
    ratio = draw[:, :1] if mask_ratio is None else mask_ratio
    draw = draw[:, 1:].masked_fill(~decoded, torch.inf)
    masked = decoded & ((draw < ratio) | (draw == draw.amin(1, keepdim=True)))
    logits = masked_logits(model, trajectories, masked, masked, mask_id)           # (B, N, V)
    nll = token_nll(logits, response.masked_fill(~masked, 0))            # 0: any token
    loss = row_mean(nll, masked).mean()                                  # Eq. 1
    return loss, {"nll": loss.detach()}

# == 7. Trajectory discrimination score (Eq. 10-11) ================================================
# How well a state tells easy from hard: the variance of the entropies of what is still masked.  A
# model equally unsure of every position scores 0: its entropies give no order.

def trajectory_discrimination_score(entropy, masked):
    """Eq. 10: population variance where masked, (B, N), (B, N) bool -> (B,) nats squared."""
    mean = row_mean(entropy, masked)[:, None]
    return row_mean((entropy - mean) ** 2, masked)                       # Eq. 10

@torch.no_grad()
def replay(model, trajectories, *, mask_id):
    """Yield x_t, masked, entropy, (B, N) each, of the states with 0, 1, .. N tokens revealed."""
    for n_visible in range(trajectories.response.shape[1] + 1):
        masked, _ = segment_masks(trajectories.decode_rank, n_visible)
        x_t = trajectories.response.masked_fill(masked, mask_id)
        logits = response_logits(model, trajectories.prompt, x_t)        # (B, N, V)
        yield x_t, masked, predictive_entropy(ban_mask(logits, mask_id))

def discrimination_curve(model, trajectories, *, mask_id, eos_id=None):
    """Score of each state of recorded trajectories -> score (B, N+1) nats squared, counted bool.

    Column k has k tokens revealed.  A state counts if it masks two positions or more; positions
    behind an `eos_id` that is written are left out.  Eq. 11 is the mean of what counts."""
    scores, counted = [], []
    for x_t, masked, entropy in replay(model, trajectories, mask_id=mask_id):
        if eos_id is not None:
            masked = masked & ((x_t == eos_id).cumsum(1) == 0)
        scores.append(trajectory_discrimination_score(entropy, masked))
        counted.append(masked.sum(1) >= 2)
    return torch.stack(scores, 1), torch.stack(counted, 1)

# == 8. Trajectories from other people's data ======================================================

def from_decoding_order(prompt, response, decoding_order, entropy=None):
    """Trajectories from the step at which each position was written, (B, N), 0 = first, -1 = never.
    Equal steps are ordered by entropy (B, N) if there is one, else by position.  For the lists of
    the paper's authors, first fill `response` with mask_id where decoding_order < 0."""
    step = torch.as_tensor(decoding_order, device=response.device)
    require(step.shape == response.shape and not step.is_floating_point(),
            f"decoding_order must hold whole numbers of the shape {tuple(response.shape)}.")
    entropy = torch.zeros(step.shape) if entropy is None else torch.as_tensor(entropy)
    entropy = entropy.to(step.device, torch.float32)
    return Trajectories(prompt, response, ranks_from_steps(step.long(), entropy), entropy)

def validate(trajectories, mask_id, vocabulary_size):
    """Look at every value, once per data set; raise ValueError for a wrong one.  (The losses check
    shapes and settings only: to look at values makes a GPU wait.)"""
    prompt, response, decode_rank, entropy = vars(trajectories).values()
    length, decoded = response.shape[1], decode_rank >= 0
    sorted_rank = torch.arange(length, device=response.device) - length + decoded.sum(1, True)
    require((decode_rank.sort(1).values == sorted_rank.clamp(min=-1)).all(),
            "decode_rank must hold 0 .. n-1 once each in every row, and -1 elsewhere.")
    for name, tokens, ranked in (("prompt", prompt, True), ("response", response, decoded)):
        is_mask = tokens == mask_id              # allowed where nothing is ranked
        require(not (is_mask & ranked).any(), f"the {name} contains mask_id ({mask_id}).")
        require((is_mask | (tokens >= 0) & (tokens < vocabulary_size)).all(),
                f"the {name} contains a token outside of 0 .. {vocabulary_size - 1}.")
    require(entropy.isfinite().all() and (entropy >= 0).all(), "an entropy is negative or nan.")

# ==== The method ends here.  Below: rivals, and a demo on synthetic arithmetic ====================
import argparse
import copy
import inspect
import json
import math
import os
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

try:
    import toy_data as toy       # the problems, the checker, and how results are shown
except ModuleNotFoundError:      # this file was copied alone: all but the demo works
    toy = None

# == 9. The rivals =================================================================================
# Losses of the same form.  SFT-GT and SFT-SD are `nelbo_loss`, on reference solutions (GT: ground
# truth) and on the model's right answers (SD); trajectory masking is `tabom_loss` without ranking.

def dinfer_loss(model, trajectories, *, mask_id, generator=None):
    """dInfer (arXiv 2510.08666): show a state, supervise all that is revealed until a later one.
    Their numbers of visible tokens are drawn from 0 .. n, every pair of two equally likely."""
    n = trajectories.n_decoded
    one = draw_below(n + 1, generator)
    other = (one + 1 + draw_below(n, generator)) % (n + 1)               # any number but `one`
    masked, _ = segment_masks(trajectories.decode_rank, torch.minimum(one, other))
    between = masked & (trajectories.decode_rank < torch.maximum(one, other)[:, None])
    logits = masked_logits(model, trajectories, masked, between, mask_id)          # (B, N, V)
    nll = token_nll(logits, trajectories.response.masked_fill(~between, 0))
    loss = row_mean(nll, between).mean()
    return loss, {"nll": loss.detach()}

def t3d_loss(model, trajectories, *, mask_id, generator=None, reference, a=0.5, b=0.1, c=0.2):
    """T3D (arXiv 2602.12262): prefer the recorded tokens x0 to y^, what a reference would write.

    With l(y) = mean log p(y) over the masked tokens of a random cut, and L_path = the sum of their
    -log p(x0), weighted from 1 for the next one linearly down to 1/n_masked for the last:
    L = -log sigma(b [l(x0) - l_ref(x0)]) - a log(1 - sigma(b [l(y^) - l_ref(y^)])) + c L_path.
    reference: a callable like `model`, see `LaggedCopy`.  Returns loss, metrics.
    """
    require(all(0 <= one < math.inf for one in (a, b, c)), f"a, b, c must be 0 or more: {a, b, c}.")
    n = trajectories.n_decoded
    masked, _ = segment_masks(trajectories.decode_rank, draw_below(n, generator))
    logits = masked_logits(model, trajectories, masked, masked, mask_id)           # (B, N, V)
    with torch.no_grad():
        theirs = masked_logits(reference, trajectories, masked, masked, mask_id)

    def log_ratio(y):                                                    # l(y) - l_ref(y), (B,)
        return row_mean(token_nll(theirs, y) - token_nll(logits, y), masked)

    x_0 = trajectories.response.masked_fill(~masked, 0)
    rejected = theirs.argmax(-1)                                         # y^
    preference = -F.logsigmoid(b * log_ratio(x_0)) - a * F.logsigmoid(-b * log_ratio(rejected))
    remaining = (n[:, None] - trajectories.decode_rank).float()          # n_masked .. 1
    weight = remaining / masked.sum(1, keepdim=True).clamp(min=1)            # (B, N)
    path = torch.where(masked, weight * token_nll(logits, x_0), 0).sum(1)
    loss = (preference + c * path).mean()
    return loss, {"preference": preference.mean().detach(), "path": path.mean().detach()}

class LaggedCopy:
    """A frozen copy of an nn.Module that catches up every `every` calls: the reference of T3D."""
    def __init__(self, model, every=10):
        self.model, self.frozen = model, copy.deepcopy(model).eval()
        self.every, self.calls = every, 0

    @torch.no_grad()
    def __call__(self, tokens):
        if self.calls % self.every == 0:
            self.frozen.load_state_dict(self.model.state_dict())
        self.calls += 1
        return self.frozen(tokens)

# == 10. Settings: each with its reason, and the paper's value where it has one ====================
# The task, `pick`: multiply by a number of your choice whose digits lie in a range of c digits, and
# show the working, the steps between (see the head of toy_data.py).  An arm is a row of the tables:
# the base, TABOM, a rival or a control.  It may have settings of its own, as in
# TABOM:margin=0.3,rounds=2: those from `queries` down.  A new setting belongs to its block.

@dataclass(frozen=True)
class Config:
    # The base, and how all is measured
    layouts: int = 3                  # orders of the fields; the prompt names one (1: always a)
    layers: int = 3                   # 0.34 million parameters, pretrained on a laptop in minutes
    width: int = 96
    pretrain_updates: int = 5000      # then nearly all is right in the best order
    split: str = "test"               # "validation" for tuning
    test_problems: int = 400          # of add, sub, mul and each c of pick, at most
    samples: int = 16                 # answers to a prompt, to see how wide the choice is
    # Which rollouts an arm has (up to kept_each), and what it makes of them
    queries: int = 10_000             # answers to collect, prompts in turn (paper: one for each)
    collect_order: str = "entropy"    # the model's own, as in the paper
    collect_order_temperature: float = 0.0   # noise on the order (paper: 0)
    collect_temperature: float = 1.0  # of the tokens; makes orders differ, too (paper: low)
    rollout_filter: str = "working"   # keep if all is right (paper: "answer"), or "none", "wrong"
    kept_each: int = 1_000_000        # keep at most so many for each c
    ranks: str = "recorded"           # controls: "shuffled", "reversed", "swapped" (another
                                      # rollout's), "alike" (of one with the same c and layout)
    style: str = "other"              # SFT-GT copies another style of working, or the model's "own"
    rounds: int = 1                   # times to collect, with the tuned model, and tune (paper: 1)
    # How it is tuned, and decodes
    updates: int = 400                # (paper: 5 epochs)
    batch_size: int = 64              # (paper: 32)
    learning_rate: float = 2e-5       # some arms have their own, in ARMS (paper: 2e-5, LoRA)
    window_size: int = 8              # of the 12 tokens (paper: 32 of 256)
    margin: float = 1.0               # gamma, nats: about the entropy gap (paper: 0.1 to 0.3)
    rank_weight: float = 2.0          # lambda (paper: 1 and 2)
    prior: str = "none"               # decode with a prior: each position's mean rank in "kept"
                                      # rollouts; "contrast": that minus its mean rank in wrong

    def __post_init__(self):
        for name, value in vars(self).items():
            known, lowest = ALLOWED.get(name), (0.0 if isinstance(value, float) else 1)
            require(not known or value in known,
                    f"{name} must be one of {', '.join(map(str, known or ()))}, not {value}.")
            require(known or lowest <= value <= 1e6,
                    f"{name} must be from {lowest} to a million, not {value}.")
        require(self.width % HEADS == 0 and self.layers * self.width ** 2 <= 1e8,
                f"width must be a multiple of {HEADS}, and layers * width ** 2 <= 1e8.")

ALLOWED = {"layouts": (1, 3), "split": ("validation", "test"), "collect_order": ORDERS,
           "rollout_filter": ("working", "answer", "none", "wrong"), "style": ("own", "other"),
           "ranks": ("recorded", "shuffled", "reversed", "swapped", "alike"),
           "prior": ("none", "kept", "contrast")}
HEADS = 4
NAMES = list(Config.__dataclass_fields__)
SHARED, OWN = NAMES[:NAMES.index("queries")], NAMES[NAMES.index("queries"):]
COLLECT = OWN[:OWN.index("ranks")]
# Learning rates: the one with most right answers on validation, of a grid, among those that lose at
# most a point in add, sub, mul; TABOM's keeps its skill, too, and so is lower (see the README).
# A new arm is a line here, one in `loss_of`, and its data in `training_data` if it has its own.
ARMS = {"No-SFT": [], "SFT-GT": ["learning_rate=5e-6"], "SFT-SD": [],
        "dInfer": ["learning_rate=2e-4"], "T3D": ["learning_rate=1e-4"],
        "trajectory": ["rank_weight=0"], "TABOM": ["learning_rate=1e-5"],
        "TABOM-paper": ["rank_weight=1", "margin=0.2", "window_size=4", "learning_rate=5e-4"]}
DEFAULT_ARMS = ("No-SFT", "No-SFT:prior=kept", "No-SFT:prior=contrast", "SFT-GT",
                "SFT-GT:style=own", "SFT-SD", "dInfer", "T3D", "trajectory", "TABOM-paper", "TABOM",
                "TABOM:ranks=shuffled")
QUICK = ["pretrain_updates=150", "test_problems=20", "samples=2", "queries=200",
         "rollout_filter=none", "updates=20"]

def configure(config, assignments, names=NAMES):
    """config with ["name=value", ..] set, each read as the type that the setting has."""
    values = {}
    for name, _, text in (one.partition("=") for one in assignments):
        require(name in names, f"there is no setting {name!r} here, only {', '.join(names)}.")
        try:
            values[name] = type(getattr(config, name))(text)
        except ValueError as error:
            raise ValueError(f"{name} cannot be {text!r}.") from error
    return replace(config, **values)

def read_arm(name, common):
    """"TABOM:margin=0.3" -> "TABOM", its Config.  Later wins: common (--set), ARMS, the name."""
    arm, _, own = name.partition(":")
    require(arm in ARMS, f"there is no arm {arm!r}, only {', '.join(ARMS)}.")
    config = configure(Config(), [*common, *ARMS[arm]])
    config = configure(config, own.split(",") if own else [], OWN)
    require(arm == "No-SFT" or config.prior == "none", f"{name}: only No-SFT can have a prior.")
    return arm, config

# == 11. The denoiser ==============================================================================
# A plain bidirectional transformer.  No time input: the mask pattern says how much is left to do.

class Denoiser(nn.Module):
    """tokens (B, L+N) int64 -> logits (B, L+N, V).  [MASK] is token V, an input without output."""
    def __init__(self, vocabulary_size, length, layers, width):
        super().__init__()
        self.token = nn.Embedding(vocabulary_size + 1, width)
        self.position = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:                 # with GPT-2's 0.02 it learns more slowly
                nn.init.normal_(weight, std=0.05 if "blocks" in name else 0.1)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]  # (B, L+N, D)
        return self.head(self.blocks(x))         # (B, L+N, V); no causal mask: both sides are seen

# == 12. One training loop for pretraining and for every arm =======================================

PURPOSES = ("batches", "masks", "collect", "data", "evaluate")
N_SEEDS = 10 ** 6                # len(PURPOSES) * (seed + round * N_SEEDS) must fit 32 bits

def random_stream(seed, purpose, device="cpu"):
    """A generator for each (seed, purpose): one never shifts another, so arms are paired."""
    return torch.Generator(device).manual_seed(len(PURPOSES) * seed + PURPOSES.index(purpose))

progress = partial(tqdm, leave=False, delay=2, disable=None)   # a bar on stderr, if a terminal
say = tqdm.write                                               # a line on stdout, above the bar

def train(model, data, loss_fn, optimizers, *, updates, batch_size, warmup, seed, label, odds=None):
    """Train in place, with warm-up, cosine decay and clipping.  odds (n,) of drawing each row."""
    batches = random_stream(seed, "batches")
    masks = random_stream(seed, "masks", data.response.device)
    odds = torch.ones(len(data)) if odds is None else odds
    def rate(update):
        return min((update + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * update / updates))
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, rate) for one in optimizers]
    model.train()
    for update in progress(range(1, updates + 1), label):
        rows = torch.multinomial(odds, batch_size, replacement=True, generator=batches)
        batch = data[rows.to(data.response.device)]
        loss, metrics = loss_fn(model, batch, mask_id=toy.MASK_ID, generator=masks)
        require(loss.isfinite(), f"{label}: the loss became {loss.item()} at update {update}: "
                "lower its learning_rate, margin or rank_weight.")
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        if update == 1 or update % max(1, updates // 4) == 0:
            values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            say(f"    {label}, update {update}: {values}")
    model.eval()

def pretrain(model, config, corpus, odds, seed):
    """Eq. 1 on the corpus.  Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
    others = [weight for name, weight in model.named_parameters()
              if weight.dim() < 2 or not name.startswith("blocks")]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2),
                  torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), fused=True)]
    train(model, corpus, nelbo_loss, optimizers, updates=config.pretrain_updates, batch_size=64,
          warmup=100, seed=seed, label="pretraining", odds=odds)

# == 13. Self-distillation, and what each arm makes of it ==========================================
# The model answers queries and a checker keeps what is right: the data of all arms but SFT-GT.

def halves(rows):
    """Rows of the toy (n, L+N) -> prompt (n, L), response (n, N)."""
    return rows.split([toy.PROMPT_LENGTH, toy.RESPONSE_LENGTH], 1)

def rows_of(trajectories):
    return torch.cat([trajectories.prompt, trajectories.response], 1)

def solved(rows):
    """Solved rows as Trajectories.  Nobody decoded them: their ranks count from the left."""
    return from_decoding_order(*halves(rows), torch.where(toy.is_given(rows), -1, 0))

def answer(model, problems, **settings):
    """Decode problems (n, L+N) -> Trajectories, correct (n,) bool.  Settings as in `decode`."""
    parts = map(halves, progress(problems.split(1000), "decoding"))
    answers = Trajectories.cat([
        decode(model, prompt, given.shape[1], mask_id=toy.MASK_ID, given=given, **settings)
        for prompt, given in parts])
    return answers, toy.is_correct(rows_of(answers))

def percent_right(model, problems, **settings):
    """Of problems of pick -> {"all": .., "1": .., .. "5": ..}, by c."""
    return toy.by_choices(problems, answer(model, problems, **settings)[1])

def self_distil(model, queries, config, seed):
    """Def. 1 -> rollouts (Trajectories), correct (n,) bool, kept (Trajectories)."""
    groups = [queries[toy.n_choices(queries) == c] for c in toy.CHOICES]
    turn = torch.arange(-(-config.queries // len(groups)), device=queries.device)
    asked = torch.cat([group[turn % len(group)] for group in groups])    # as many for each c
    rollouts, correct = answer(
        model, asked, generator=random_stream(seed, "collect", queries.device),
        order=config.collect_order, order_temperature=config.collect_order_temperature,
        temperature=config.collect_temperature)
    keep = {"working": correct & toy.working_is_right(rows_of(rollouts)), "answer": correct,
            "wrong": ~correct, "none": torch.ones_like(correct)}[config.rollout_filter]
    keep = keep.view(len(groups), -1)                                    # a row for each c
    kept = rollouts[(keep & (keep.cumsum(1) <= config.kept_each)).flatten()]
    require(len(kept) >= 16, f"only {len(kept)} of {len(asked)} rollouts are kept, too few to train"
            " on: raise pretrain_updates or queries, or set another rollout_filter.")
    return rollouts, correct, kept

def training_data(arm, kept, config, seed):
    """What an arm trains on, row by row for the same queries -> Trajectories."""
    rank, generator = kept.decode_rank, random_stream(seed, "data", kept.prompt.device)
    if arm == "SFT-GT":
        return solved(toy.references(kept.prompt, config.style, generator))
    if config.ranks == "shuffled":
        rank = torch.rand(rank.shape, generator=generator, device=rank.device).argsort(1)
    if config.ranks == "reversed":
        rank = rank.shape[1] - 1 - rank          # in pick every position is decoded
    if config.ranks in ("swapped", "alike"):
        row = torch.randperm(len(rank), generator=generator, device=rank.device)
        if config.ranks == "alike":      # the row before is of the same kind, but for each first
            kind = 3 * toy.n_choices(kept.prompt) + toy.layout_of(kept.prompt)
            row = row[kind[row].argsort(stable=True)]
        rank = torch.empty_like(rank).index_copy(0, row, rank[row.roll(1)])
    return replace(kept, decode_rank=rank)

def loss_of(arm, model, config):
    in_window = partial(tabom_loss, window_size=config.window_size, margin=config.margin,
                        rank_weight=config.rank_weight)
    if arm == "T3D":
        return partial(t3d_loss, reference=LaggedCopy(model))
    return {"SFT-GT": nelbo_loss, "SFT-SD": nelbo_loss, "dInfer": dinfer_loss,
            "trajectory": in_window, "TABOM-paper": in_window, "TABOM": in_window}[arm]

# == 14. Evaluation ================================================================================
# Always the last checkpoint, on prompts that stand in no corpus and in no query.

@dataclass
class Bench:
    """What all arms of a seed share."""
    seed: int
    base: nn.Module
    queries: Tensor              # problems of pick, (n, L+N)
    validation: Tensor           # the same
    tests: dict                  # {domain: problems}
    held_out: Trajectories       # kept answers of the base to the validation prompts
    collected: dict              # what the base gave, for each way of collecting

def evaluate(model, bench, config, order="entropy"):
    """Every figure of one model that decodes in an order."""
    pick, mask_id = bench.tests["pick"], toy.MASK_ID
    draws = partial(random_stream, bench.seed, "evaluate", pick.device)
    answers, correct = answer(model, pick, order=order)
    by_c = toy.by_choices(pick, correct)
    several = toy.first_of_each(pick, 30, toy.CHOICES[1:]).repeat_interleave(config.samples, 0)
    sampled, right = answer(model, several, order=order, temperature=1.0, generator=draws())
    tds, counted = discrimination_curve(model, answers, mask_id=mask_id)
    with torch.no_grad():
        _, ranking = tabom_loss(                 # for its pair accuracy; the default window
            model, bench.held_out, mask_id=mask_id, window_size=Config.window_size, margin=0.0,
            rank_weight=0.0, generator=random_stream(bench.seed, "masks", pick.device))
    old = {domain: 100 * answer(model, problems, order=order)[1].float().mean().item()
           for domain, problems in bench.tests.items() if domain != "pick"}
    return {"greedy": by_c["all"], "by c": by_c, "old": old,
            "2 tokens": percent_right(model, pick, order=order, tokens_per_step=2)["all"],
            "sampled": toy.by_choices(several, right)["all"],
            "best order": percent_right(model, pick, order=toy.best_order, temperature=1.0,
                                        generator=draws())["all"],
            "effective factors": toy.effective_factors(rows_of(sampled), right, config.samples),
            **toy.factor_figures(rows_of(answers), answers.decode_rank),
            "TDS": tds[counted].mean().item(),                           # Eq. 11
            "pair accuracy": 100 * ranking["pair_accuracy"].item()}

@torch.no_grad()
def why_order_matters(base, pick, seed):
    """Right answers of the base by order of decoding, and the entropy gap; each by c."""
    orders = {"entropy": {}, "confidence": {"order": "confidence"}, "margin": {"order": "margin"},
              "left to right": {"block_length": 1},
              "right to left": {"order": -torch.arange(toy.RESPONSE_LENGTH)},
              **{f"blocks of {length}": {"block_length": length} for length in (2, 3, 4, 6)},
              "random": {"order": "random"}, "best": {"order": toy.best_order},
              "best, sampled": {"order": toy.best_order, "temperature": 1.0}}
    by_c = {name: percent_right(base, pick, **settings,
                                generator=random_stream(seed, "evaluate", pick.device))
            for name, settings in orders.items()}
    start = predictive_entropy(response_logits(base, *halves(pick)))     # (n, N)
    return {"orders": {name: row["all"] for name, row in by_c.items()}, "orders by c": by_c,
            "entropy gap": toy.by_choices(pick, toy.entropy_gap(pick, start))}

PRIOR_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)   # nats per unit of mean rank

def prior_order(bench, rollouts, correct, kept, kind):
    """No training: entropies plus a weight times the mean rank of each position, in the layout that
    the prompt names -> order, weight, the best on validation prompts."""
    def mean_rank(data):                                                 # (3, N)
        return torch.stack([data.decode_rank[toy.layout_of(data.prompt) == one].float().mean(0)
                            for one in range(3)])
    wrong = mean_rank(rollouts[~correct]) if kind == "contrast" else 0
    rank = (mean_rank(kept) - wrong).nan_to_num()          # no rollouts in a layout: no prior
    def order_of(weight):
        return lambda logits, tokens: (predictive_entropy(logits)
                                       + weight * rank[toy.layout_of(tokens)])
    best = max(PRIOR_WEIGHTS, key=lambda weight: percent_right(
        bench.base, bench.validation, order=order_of(weight))["all"])
    return order_of(best), best

# == 15. The demo ==================================================================================

def run_arm(name, arm, config, bench):
    """Collect, tune, evaluate, `rounds` times -> figures, model."""
    model, order, weight, rounds = copy.deepcopy(bench.base), "entropy", None, []
    for round_number in range(config.rounds):
        seed = bench.seed + round_number * N_SEEDS                       # other draws in each round
        way = (round_number, *settings_of(config, COLLECT).values())
        rollouts, correct, kept = bench.collected.get(way) or self_distil(
            model, bench.queries, config, seed)
        if round_number == 0:                    # with the base: once for all arms
            bench.collected[way] = rollouts, correct, kept
        if config.prior != "none":
            order, weight = prior_order(bench, rollouts, correct, kept, config.prior)
        if arm != "No-SFT":
            data = training_data(arm, kept, config, seed)
            optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate,
                                          betas=(0.9, 0.98), fused=True)
            train(model, data, loss_of(arm, model, config), [optimizer], updates=config.updates,
                  batch_size=config.batch_size, warmup=20, seed=seed, label=name)
        figures = evaluate(model, bench, config, order)
        rounds.append({"kept": len(kept), **{figure: figures[figure] for figure in (
            "greedy", "sampled", "best order", "effective factors")}})
    return {"settings": settings_of(config, OWN), **figures, "prior weight": weight,
            "rounds": rounds}, model

def film(problems, base, tuned):
    """How two models decode a prompt, side by side, state by state, as text: of the prompts that
    base gets wrong and tuned right (if any), the one on which the factor comes forward most."""
    answers, correct = zip(*(answer(model, problems) for model in (base, tuned)))
    turn = [one.decode_rank.where(toy.is_factor(problems), 0).sum(1) for one in answers]
    told = correct[1] & toy.working_is_right(rows_of(answers[1])) & ~correct[0]
    best = (turn[0] - turn[1] + 100 * told).argmax().item()
    shown = []
    for model, one in zip((base, tuned), answers):
        one = one[best:best + 1]
        shown.append((rows_of(one)[0], one.decode_rank[0],
                      [entropy[0] for _, _, entropy in replay(model, one, mask_id=toy.MASK_ID)]))
    return toy.draw_trajectories(("base", "TABOM"), shown)

def run_seed(config, seed, arms, device, folder):
    """The whole chain of one seed -> every figure; what is finished is stored at once.
    arms: {name: (arm, Config)}."""
    started = time.time()
    def stage(title):
        say(f"\n[{time.time() - started:4.0f} s] {title}")

    run, weights = load(folder, seed, config, arms)
    corpus, odds, problems = toy.split_problems(seed, config.layouts)
    tests = {domain: toy.first_of_each(parts[config.split].to(device), config.test_problems)
             for domain, parts in problems.items()}
    queries, validation = (problems["pick"][part].to(device) for part in ("query", "validation"))

    stage(f"Seed {seed}: pretrain as usual (Eq. 1)")
    torch.manual_seed(seed)                      # the initial weights
    base = Denoiser(len(toy.VOCABULARY), corpus.shape[1], config.layers, config.width).to(device)
    if weights:
        say("    not again: the base is there")
        base.load_state_dict(weights["base"])
    else:
        pretrain(base, config, solved(corpus).to(device), odds, seed)
        weights = {"settings": settings_of(config, SHARED), "base": base.state_dict()}
        save(folder, f"seed-{seed}.pt", weights)
    base.eval()

    stage("Why order matters: right answers of the base to pick in percent, by order of decoding")
    if not run:
        run = {"seed": seed, "settings": settings_of(config, SHARED), "made by": made_by(device),
               **why_order_matters(base, tests["pick"], seed), "arms": {}}
    say(toy.orders_table(run["orders by c"], run["entropy gap"]))

    stage("Fine-tune: same base, same batch order, same number of updates, last checkpoint")
    if "T3D" in arms:
        say("    T3D's preference stays near 1.5 ln 2: its reference follows every 10 updates")
    held_out = self_distil(base, validation, replace(config, queries=1000), seed)[-1]
    bench = Bench(seed, base, queries, validation, tests, held_out, {})
    for name, (arm, own) in arms.items():
        if name in run["arms"]:
            say(f"    {name}: not again, its figures are there")
            continue
        run["arms"][name], model = run_arm(name, arm, own, bench)
        say(f"    {name}: {run['arms'][name]['greedy']:.1f} percent of pick")
        if name == "TABOM":
            weights["TABOM"] = model.state_dict()
            save(folder, f"seed-{seed}.pt", weights)
        save(folder, f"seed-{seed}.json", run)
    if "TABOM" in weights:
        stage("Of the prompts that only TABOM gets right, that where its factor came forward most:"
              "\n    what was just written is marked, what is hidden is denser the less sure")
        tuned = copy.deepcopy(base)
        tuned.load_state_dict(weights["TABOM"])
        say(film(toy.first_of_each(tests["pick"], config.test_problems, [4]), base, tuned))
    return run

def report(runs):
    """The tables of one or several seeds as text; differences between arms are paired by seed."""
    names = list(dict.fromkeys(name for run in runs for name in run["arms"]))
    pairs = [(name, "No-SFT") for name in names if name != "No-SFT"]
    pairs += [("TABOM", name) for name in names if name not in ("No-SFT", "TABOM")]
    return toy.report(runs, pairs)

# == 16. The command line, and one folder for a run ================================================

def settings_of(config, names):
    return {name: getattr(config, name) for name in names}

def made_by(device):
    """Shown beside the figures, never compared."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": hardware, "threads": torch.get_num_threads(), "torch": torch.__version__}

def save(folder, name, content):
    """Write a seed-N.json or seed-N.pt under another name; rename it when it is complete."""
    if folder is None:
        return
    unfinished = folder / f".{name}.{os.getpid()}"
    try:
        with open(unfinished, "wb") as file:
            if name.endswith(".pt"):
                torch.save(content, file)
            else:
                file.write(json.dumps(content, indent=1).encode())
        unfinished.replace(folder / name)
    finally:
        unfinished.unlink(missing_ok=True)

def read_stored(path):
    """A seed-N.json or seed-N.pt -> its content, {} if there is none."""
    if not path.exists():
        return {}
    try:
        content = (json.loads(path.read_bytes()) if path.suffix == ".json"
                   else torch.load(path, map_location="cpu", weights_only=True))
        dict(content["settings"]), dict(content["arms" if path.suffix == ".json" else "base"])
    except OSError:
        raise
    except Exception as error:                   # json and torch have many ways to fail
        raise ValueError(f"{path} was not written by this program: name another folder.") from error
    return content

def load(folder, seed, config, arms):
    """Figures and weights of a seed, {} where nothing is stored; other settings are refused."""
    if folder is None:
        return {}, {}
    run, weights = (read_stored(folder / f"seed-{seed}.{kind}") for kind in ("json", "pt"))
    every = [weights, *map(read_stored, folder.glob("seed-*.json"))]     # one kind of base
    made = [("the base", stored["settings"], config) for stored in every if stored]
    made += [(name, run["arms"][name]["settings"], own) for name, (_, own) in arms.items()
             if run and name in run["arms"]]
    for what, settings, wanted in made:
        for name, value in settings.items():
            here = getattr(wanted, name, None)
            require(value == here, f"{folder}: {what} was made with {name}={value}, not {here}: "
                    "name another folder.")
    require(weights or not run, f"{folder}, seed {seed}: the base of these figures, "
            f"seed-{seed}.pt, is gone: name another folder.")
    return run, weights

def demo(options):
    """Check everything first, then run the seeds."""
    common = [*(QUICK if options.quick else []), *options.set]
    config, arms = configure(Config(), common), {one: read_arm(one, common) for one in options.arms}
    for given in (options.seeds, options.arms):
        require(len(set(given)) == len(given),
                f"{' '.join(map(str, given))}: one of these is named twice.")
    require(all(0 <= seed < N_SEEDS for seed in options.seeds), "a seed must be from 0 to 999999.")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: PyTorch finds no such device.") from error
    if options.out:                              # what cannot be written to is found out now
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    for seed in options.seeds:
        load(options.out, seed, config, arms)
    say(f"TABOM on synthetic arithmetic: {made_by(device)}")
    if options.quick:
        say("--quick trains far too little: the figures below mean nothing.")
    runs = [run_seed(config, seed, arms, device, options.out) for seed in options.seeds]
    say("\n" + report(runs))

def parse(arguments):
    settings, _, _ = inspect.getsource(Config).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="tabom.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"""arms: {', '.join(ARMS)}
each also with settings of its own, from `queries` down, as in TABOM:margin=0.3,window_size=4
\nsettings, their defaults and reasons:\n{settings}""")
    first, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    first.add_argument("--demo", action="store_true", help="run it all and compare the arms")
    first.add_argument("--report", type=Path, metavar="FOLDER", help="print a folder's tables")
    add("--quick", action="store_true", help="in a minute or two, only to see that it runs")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--arms", nargs="+", default=DEFAULT_ARMS, help=f"default: {' '.join(DEFAULT_ARMS)}")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="for all arms but those with another value in ARMS")
    add("--out", type=Path, metavar="FOLDER", help="keep figures, weights; resume (default: no)")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    options = parser.parse_args(arguments or ["--help"])
    if options.report and len(arguments) > 2:
        parser.error("--report FOLDER goes alone")
    return options

def main(arguments):
    """Run the command line -> exit code: 0, 2 for what the user can fix, 130 for Ctrl-C."""
    try:
        options = parse(arguments)
        require(toy, "toy_data.py is missing; it belongs beside tabom.py.")
        if options.demo:
            demo(options)
        if options.report:
            paths = sorted(options.report.glob("seed-*.json"), key=lambda path: path.name.zfill(20))
            require(paths, f"there is no seed-N.json in {options.report}.")
            say(report([read_stored(path) for path in paths]))
    except BrokenPipeError:                      # `| head` has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"tabom.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntabom.py: stopped; what was finished stays.", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)   # some terminals lack × or █
    sys.exit(main(sys.argv[1:]))
