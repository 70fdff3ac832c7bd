# SPDX-License-Identifier: MIT
"""TABOM in one file: train a masked diffusion language model on the order in which it decodes.

Such a model fills in the hidden tokens ([MASK]) of a response.  To answer, it starts with all of
them hidden and writes them one by one, the surest (lowest entropy) first.  But it is trained on
responses with *random* tokens hidden, and decoding rarely passes through such *states*.
TABOM (Self-Distilled Trajectory-Aware Boltzmann Modeling, arXiv 2605.11854; this file is
unofficial) trains on the states that the model itself passed through on its way to right answers:

    1. pretrain as usual: hide random tokens, predict them                         (Eq. 1)
    2. let the model answer queries, and record when each position was written     (Eq. 2, Def. 1)
    3. keep the answers that your checker accepts: their orders tend to be the better ones
    4. rebuild a state on the way to a kept answer, and train on the next tokens   (Eq. 9, term 1)
    5. also rank these tokens: those written earlier should be surer, so that      (Eq. 7-8)
       decoding, which starts with the surest, repeats this order

A *trajectory* is an answer and the ranks that say when each position was written.  To *cut* it is
to show what was written before some moment and hide the rest.  The *window* is the W tokens written
next.  Training as usual cuts a random order and learns all hidden tokens.  *Trajectory masking*
(step 4 alone) cuts the recorded order and learns the window.  TABOM also ranks the window.

    python tabom.py --demo    all of it on arithmetic, four minutes on a laptop; see also --help

A model is any callable that maps tokens (B, L+N) to logits (B, L+N, V) and sees both sides of a
token (no causal mask).  Sizes: B rows, L prompt tokens, N response tokens (n of them decoded),
V vocabulary entries, K True values in a mask (B, N).  "Sure" means low entropy, in nats.
"""
# ==== The method begins here: copy sections 1-7.  They need nothing but torch and your model. =====
from dataclasses import dataclass

import torch
from torch import Tensor

# == 1. A trajectory and a cut =====================================================================
# One rank per position says when it was written; the ranks rebuild every state on the way.  For
# example, ranks 2 0 3 1 4, cut after two writes, with a window of two:
#
#     decode_rank    2    0    3    1    4
#     the model sees [M]  x1   [M]  x3   [M]       visible: rank < 2
#     the window     *         *                   written next: ranks 2 and 3

@dataclass(frozen=True)
class Trajectories:
    """Responses that remember the order in which they were written (Def. 1).
    prompt (B, L) and response (B, N), int64 tokens
    decode_rank (B, N) int64: 0 = written first; in each row a permutation of 0 .. n-1 over the n
                positions that were decoded, and -1 at the others.  The others (given, padding)
                stay visible as they are, and are never trained or ranked."""
    prompt: Tensor
    response: Tensor
    decode_rank: Tensor

    def __post_init__(self):
        p, r, ranks = (tuple(field.shape) for field in vars(self).values())
        require(len(p) == len(r) == 2 and p[0] == r[0] and r == ranks
                and all(x.dtype == torch.int64 for x in vars(self).values()), "prompt (B, L), "
                f"response (or given), rank (B, N) must be int64, not {p}, {r}, {ranks}.")
        place = torch.arange(r[1], device=self.response.device) - r[1]                 # -N .. -1
        sorted_rank = (place + self.n_decoded[:, None]).clamp(min=-1)    # -1 .. -1, 0 .. n-1
        require(self.decode_rank.sort(1).values.equal(sorted_rank),
                "decode_rank must hold 0 .. n-1 once each in every row, and -1 elsewhere.")

    def __len__(self):
        return len(self.response)

    def __getitem__(self, rows):
        """Rows by boolean mask, index tensor or slice."""
        return Trajectories(*(field[rows] for field in vars(self).values()))

    @classmethod
    def cat(cls, parts):
        return cls(*map(torch.cat, zip(*(vars(part).values() for part in parts))))

    def only(self, keep):
        """Neither train nor rank where keep (B, N) bool is False.  The response stays visible:
        padding gives away an answer's length.  To hide it, too, first write mask_id there."""
        return from_steps(self.prompt, self.response, self.decode_rank.masked_fill(~keep, -1))

    @property
    def n_decoded(self):
        return (self.decode_rank >= 0).sum(1)                            # (B,) n

def rank_in_row(values):
    """(B, N) -> (B, N) int64.  The smallest value of a row gets 0.  A tie goes to the leftmost."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)

def from_steps(prompt, response, step, entropy=None):
    """Trajectories from the step (B, N) at which each position was written, -1 = never.
    Within a step, the lowest entropy (B, N) ranks first.  Without entropies, the leftmost does.
    Steps 2 0 -1 0 with entropies .3 .9 .1 .4 give ranks 2 1 -1 0."""
    require(step.shape == response.shape and not step.is_floating_point(),
            f"step must hold whole numbers of the shape {tuple(response.shape)}.")
    within = 0 if entropy is None else rank_in_row(entropy)              # below N
    when = (step.long() * step.shape[1] + within).masked_fill(step < 0, 2 ** 62)   # never: last
    return Trajectories(prompt, response, rank_in_row(when).masked_fill(step < 0, -1))

def cut(decode_rank, n_visible, window_size=1):
    """The state after n_visible writes, an int or (B,) -> masked, window: (B, N) bool.
    masked (paper: M_t) marks all hidden positions, window (Delta) the next window_size of them."""
    require_size("window_size", window_size)
    n_visible = torch.as_tensor(n_visible, device=decode_rank.device)
    require(n_visible.shape in ((), (len(decode_rank),)) and not n_visible.is_floating_point()
            and (n_visible >= 0).all(), "n_visible must be a whole number, or one for each row.")
    masked = decode_rank >= n_visible.view(-1, 1)                        # not where the rank is -1
    return masked, masked & (decode_rank - n_visible.view(-1, 1) < window_size)

def draw_below(limit, generator):
    """(B,) limits -> (B,) int64, each uniform on 0 .. limit-1.  They are stratified over rows: of
    4 rows with limit 8, one gets 0 or 1, one 2 or 3, and so on.  Gradients get less noisy."""
    require((limit > 0).all(), "in some row nothing was decoded: use data[data.n_decoded > 0].")
    part = torch.randperm(len(limit), generator=generator, device=limit.device)
    within = torch.rand(len(limit), generator=generator, device=limit.device, dtype=torch.float32)
    return ((part + within) / len(limit) * limit).long().minimum(limit - 1)  # round-off

def scatter(values, chosen, elsewhere=0.0):
    """(K,) values of the chosen (B, N) positions -> (B, N)."""
    return values.new_full(chosen.shape, elsewhere).masked_scatter(chosen, values)

def row_mean(values, chosen):
    """(K,) values of the chosen (B, N) positions -> (B,) mean of each row, 0 without any."""
    return scatter(values, chosen).sum(1) / chosen.sum(1).clamp(min=1)

# == 2. Ask the model, and how unsure it is ========================================================
def ask(model, prompt, response, masked, wanted, mask_id):
    """The only call of a model: hide `masked`, predict `wanted`, (B, N) bool each -> logits (K, V).
    logits[:, i] must predict token i (in Dream it predicts token i + 1: shift the logits).  If the
    vocabulary has an entry for [MASK], its logit becomes -inf, so [MASK] is never an answer."""
    require_size("mask_id", mask_id, lowest=0)
    require(not (prompt == mask_id).any(), f"the prompt contains mask_id ({mask_id}).")
    tokens = torch.cat([prompt, response.masked_fill(masked, mask_id)], 1)         # the paper's x_t
    require(len(tokens) > 0, "there are no rows to show to the model: did the checker keep any?")
    logits = model(tokens)
    require(isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == tokens.shape,
            f"the model must return a tensor of logits {(*tokens.shape, 'V')} (output.logits).")
    logits = logits[torch.nn.functional.pad(wanted, (prompt.shape[1], 0))]         # (K, V)
    logits[:, mask_id:mask_id + 1] = -torch.inf  # an empty slice if there is no such entry
    return logits

def predict(model, trajectories, masked, wanted, mask_id):
    """Hide `masked` and predict `wanted`, both (B, N) bool -> log p at `wanted`, (K, V) float32.
    The logits of other positions are never used, so even a nan there cannot reach a loss."""
    require(wanted.any(1).all(), "a row has nothing left to predict: n_visible must be below n.")
    logits = ask(model, trajectories.prompt, trajectories.response, masked, wanted, mask_id)
    return logits.log_softmax(-1, dtype=torch.float32)

def token_nll(log_p, tokens):
    """-log p of each token: (K, V), (K,) -> (K,) nats."""
    nll = -log_p.gather(1, tokens[:, None]).squeeze(1)
    require(nll.isfinite().all(), "logits that count are nan or +inf, or ban the token to learn.")
    return nll

def entropy_of(log_p):
    """H = -sum_v p(v) log p(v), (..., V) -> (...) nats.  A term with p = 0 is exactly 0, and so
    is its gradient.  Otherwise 0 * -inf would give nan."""
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)

def predictive_entropy(logits):
    """Entropy over the whole vocabulary: (..., V) -> (...) float32, nats.  -inf bans a token."""
    return entropy_of(logits.log_softmax(-1, dtype=torch.float32))

# == 3. Decode from easy to hard, and remember the order (Eq. 2, Def. 1) ===========================
# Start fully masked; at each step ask about every masked position, write the surest, note the step.
# An `order` is a function that says how hard each candidate is; the easiest is written first.

def by_entropy(logits, tokens, candidates):
    """logits (K, V) at candidates (B, N) bool, tokens (B, L+N) the model saw -> difficulty (K,)."""
    return predictive_entropy(logits)

def by_confidence(logits, tokens, candidates):
    """As in LLaDA: the highest top probability first."""
    return -logits.softmax(-1, dtype=torch.float32).amax(-1)

@torch.no_grad()
def decode(model, prompt, response_length, *, mask_id, order=by_entropy, tokens_per_step=1,
           temperature=0.0, block_length=None, generator=None, given=None):
    """Answer prompts (B, L) -> `Trajectories` with responses of response_length = N tokens.
    order            what counts as easy: a function as above.  Ties go to the leftmost.
    tokens_per_step  positions written per forward pass, ranked among themselves by entropy
    temperature      0 is greedy.  Above 0, tokens are sampled, but positions are not.
    block_length     finish a block of positions before the next (semi-autoregressive, as in LLaDA)
    generator        seeds the sampling; it must be on the device of the prompt
    given            (B, N) int64, for infilling: tokens that stay, and mask_id where to decode
    Dropout must be off: call eval().  A row of `given` without mask_id is returned as it is."""
    shape = (len(prompt), response_length)
    block_length = response_length if block_length is None else block_length
    check_decoding(mask_id, response_length, tokens_per_step, block_length, temperature)
    response = prompt.new_full(shape, mask_id) if given is None else given.clone()
    masked = response == mask_id
    written_at = prompt.new_full(shape, -1)
    Trajectories(prompt, response, written_at)   # raises if a shape or dtype is wrong
    entropy_then = prompt.new_zeros(shape, dtype=torch.float32)
    block = torch.arange(response_length, device=prompt.device) // block_length    # (N,)
    for step in range(response_length):
        if not masked.any():
            break
        first_open = block.where(masked, response_length).amin(1, keepdim=True)        # (B, 1)
        candidates = masked & (block == first_open)                      # (B, N), K of them
        logits = ask(model, prompt, response, masked, candidates, mask_id)         # (K, V)
        entropy = predictive_entropy(logits)                             # (K,)
        difficulty = order(logits, torch.cat([prompt, response], 1), candidates).float()
        require(difficulty.shape == entropy.shape and (entropy + difficulty).isfinite().all(),
                "where it may write, logits and order must be finite, one number per candidate.")
        place = rank_in_row(scatter(difficulty, candidates, torch.inf))  # (B, N)
        chosen = candidates & (place < tokens_per_step)                  # Eq. 2
        now = chosen[candidates]                                         # (K,)
        response[chosen] = pick_tokens(logits[now], temperature, generator)
        written_at[chosen], entropy_then[chosen] = step, entropy[now]
        masked = masked & ~chosen
    return from_steps(prompt.clone(), response, written_at, entropy_then)

def pick_tokens(logits, temperature, generator):
    """(K, V) -> (K,): the likeliest tokens, or samples if the temperature is above 0."""
    if temperature == 0:
        return logits.argmax(-1)
    below_best = logits.float() - logits.float().amax(-1, keepdim=True)  # at most 0: no overflow
    return (below_best / temperature).softmax(-1).multinomial(1, generator=generator).squeeze(1)

# == 4. The ranking loss (Eq. 7-8) =================================================================
# In a right answer, position r was written before s.  The model will repeat this if it prefers r at
# each cut that hides both.  It prefers low entropy h.  So Eq. 8 asks for h(r) < h(s), by a margin.
# Why "Boltzmann": let P(state) = exp(-beta E) / Z, where E sums the entropies at which its tokens
# were written.  Of two next states, that with the lower h is likelier, for any beta > 0 (Lemma 1).
# Low entropy made the order.  Is this circular?  No.  Tokens are sampled, so orders differ, and we
# keep those of right answers.  And at a cut, only the next token is the surest by construction.
# The others became the surest later, when more was visible: the model must foresee that.

def pairwise_rank_loss(entropy, decode_rank, window, margin):
    """Eq. 8: mean over the window's pairs of max(0, h(r) - h(s) + margin), then over rows.
    h = entropy (B, N) nats; decode_rank (B, N); window (B, N) bool; margin (gamma) nats.
    In a pair (r, s), r was written before s.  A row without a pair counts as 0.  Returns the loss
    and pair_accuracy, the detached share of pairs with h(r) < h(s).  Chance is 0.5.
    In each pair not yet a margin apart, the gradient pushes h(r) down and h(s) up: s shall wait."""
    require(entropy.shape == decode_rank.shape == window.shape and window.dtype == torch.bool
            and len(entropy) > 0, "entropy, decode_rank and a bool window must be (B, N), B > 0.")
    require_amount("margin", margin)
    # Window positions to the front of each row, in recorded order: W x W pairs, not N x N.
    front = decode_rank.masked_fill(~window, 2 ** 62).argsort(1)[:, :window.sum(1).max()]
    h, rank, inside = (x.gather(1, front) for x in (entropy, decode_rank, window))     # (B, W)
    pairs = inside[:, :, None] & inside[:, None, :]                      # (B, W, W)
    pairs &= rank[:, :, None] < rank[:, None, :]                         # pairs[b, earlier, later]
    excess = (h[:, :, None] - h[:, None, :])[pairs]                      # h(r) - h(s) per pair
    loss = row_mean((excess + margin).relu(), pairs.flatten(1)).mean()   # Eq. 8
    return loss, (excess < 0).float().sum() / max(1, len(excess))

# == 5. TABOM (Eq. 9) ==============================================================================
# Show exactly what had been written before a random cut of a recorded trajectory.  Then teach two
# things about the tokens that came next: *what* they are, and *in which order* they came.

def tabom_loss(model, trajectories, *, mask_id, generator=None, window_size, margin, rank_weight,
               n_visible=None):
    """Eq. 9: cross-entropy of the window + rank_weight (lambda) * its ranking loss, averaged over
    rows -> loss, metrics.  With rank_weight = 0 it is trajectory masking.
    Paper: window_size 32 of 256 tokens, margin 0.1 to 0.3 nats, rank_weight 1 or 2.  n_visible (B,)
    sets the cuts (below n), else they are drawn.  With k tokens per step, pass multiples of k."""
    check_loss(window_size, margin, rank_weight)
    if n_visible is None:
        n_visible = draw_below(trajectories.n_decoded, generator)
    masked, window = cut(trajectories.decode_rank, n_visible, window_size)
    log_p = predict(model, trajectories, masked, window, mask_id)        # (K, V)
    nll = row_mean(token_nll(log_p, trajectories.response[window]), window).mean()
    entropy = scatter(entropy_of(log_p), window)                         # (B, N), at the cut
    rank_loss, pair_accuracy = pairwise_rank_loss(entropy, trajectories.decode_rank, window, margin)
    loss = nll + rank_weight * rank_loss                                 # Eq. 9
    return loss, {"nll": nll.detach(), "rank_loss": rank_loss.detach(),
                  "pair_accuracy": pair_accuracy}

# == 6. Training as usual (Eq. 1): cut a random order, learn all hidden tokens =====================

def nelbo_loss(model, trajectories, *, mask_id, generator=None):
    """Eq. 1, a bound on -log p(response) per token: the mean of -log p over a row's 1 to n hidden
    positions, then over rows.  For plain text: from_steps(prompt, text, torch.zeros_like(text))"""
    rank = shuffled(trajectories.decode_rank, generator)
    masked, _ = cut(rank, draw_below(trajectories.n_decoded, generator))
    log_p = predict(model, trajectories, masked, masked, mask_id)        # (K, V)
    loss = row_mean(token_nll(log_p, trajectories.response[masked]), masked).mean()    # Eq. 1
    return loss, {"nll": loss.detach()}

def shuffled(decode_rank, generator=None):
    """The same positions in a random order."""
    draw = torch.empty_like(decode_rank, dtype=torch.float32).uniform_(generator=generator)
    never = decode_rank < 0
    return rank_in_row(draw.masked_fill(never, torch.inf)).masked_fill(never, -1)

# == 7. All of it: collect, check, keep, and train (a minimal loop; the demo has a longer one) =====

def post_train(model, prompts, is_right, optimizer, *, response_length, mask_id, temperature,
               epochs, batch_size, generator=None, **settings):
    """Train a pretrained model on its own right answers to prompts (B, L) -> metrics per update.
    is_right(rollouts) -> (B,) bool: your checker; settings: for tabom_loss.  Turn dropout off."""
    require_size("epochs", epochs)               # all is checked before anything is decoded
    require_size("batch_size", batch_size)
    check_loss(**settings)
    rollouts = Trajectories.cat(
        decode(model, some, response_length, mask_id=mask_id, temperature=temperature,
               generator=generator) for some in prompts.split(batch_size))
    right, history = is_right(rollouts), []
    require(right.dtype == torch.bool and right.any(), "is_right must be bool, and accept some.")
    kept = rollouts[right]
    for _ in range(epochs):
        order = torch.randperm(len(kept), generator=generator, device=prompts.device)
        for rows in order.split(batch_size):
            loss, metrics = tabom_loss(model, kept[rows], mask_id=mask_id, generator=generator,
                                       **settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(metrics)
    return history

def require(fact, message):                      # the input checks, part of what you copy
    if not fact:
        raise ValueError(message)

def require_size(name, value, lowest=1):
    require(hasattr(value, "__index__") and not isinstance(value, Tensor)
            and lowest <= value < 2 ** 31,
            f"{name} must be a whole number from {lowest} to 2 ** 31 - 1, not {value}.")

def require_amount(name, value):
    require(0 <= value < torch.inf, f"{name} must be 0 or more and finite, not {value}.")

def check_loss(window_size, margin, rank_weight):
    require_size("window_size", window_size)
    require_amount("margin", margin)
    require_amount("rank_weight", rank_weight)

def check_decoding(mask_id, response_length, tokens_per_step, block_length, temperature):
    require_size("mask_id", mask_id, lowest=0)
    require_size("response_length", response_length)
    require_size("tokens_per_step", tokens_per_step)
    require_size("block_length", block_length)
    float32 = torch.finfo(torch.float32)
    require(temperature == 0 or float32.tiny <= temperature <= float32.max,
            f"temperature must be 0, or from 1.2e-38 to 3.4e38 (float32), not {temperature}.")

# ==== The method ends here.  Below: a score, rivals, and a demo on synthetic arithmetic ===========
import argparse
import copy
import inspect
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn
from tqdm import tqdm

try:
    import toy_data as toy       # the problems, the checker, and how results are shown
except ModuleNotFoundError:      # this file was copied alone: all but the demo works
    toy = None

# == 8. The trajectory discrimination score (Eq. 10-11) ============================================

@torch.no_grad()
def replay(model, trajectories, *, mask_id):
    """Yield masked and entropy, (B, N) each, after 0 .. N-1 writes.  Unmasked entropies are 0."""
    for n_visible in range(trajectories.response.shape[1]):
        masked, _ = cut(trajectories.decode_rank, n_visible)
        logits = ask(model, trajectories.prompt, trajectories.response, masked, masked, mask_id)
        yield masked, scatter(predictive_entropy(logits), masked)

def discrimination_score(states):
    """Eq. 11, in nats squared: the mean of Eq. 10 over states with two or more masked positions.
    Eq. 10 is the population variance of a state's entropies.  states: as `replay` yields them."""
    scores = []
    for masked, entropy in states:
        mean = row_mean(entropy[masked], masked)[:, None]
        variance = row_mean(((entropy - mean) ** 2)[masked], masked)     # Eq. 10, (B,)
        scores.append(variance[masked.sum(1) >= 2])
    return torch.cat(scores).mean()                                      # Eq. 11

# == 9. The rivals: two more losses for kept answers, which `--arms dInfer T3D` runs ===============

def dinfer_loss(model, trajectories, *, mask_id, generator=None):
    """dInfer (arXiv 2510.08666): show a state and learn all that was written until a later state.
    Both cuts are drawn from 0 .. n.  All pairs of different cuts are equally likely."""
    n = trajectories.n_decoded
    first = draw_below(n + 1, generator)
    second = (first + 1 + draw_below(n, generator)) % (n + 1)            # any but `first`
    masked, _ = cut(trajectories.decode_rank, torch.minimum(first, second))
    between = masked & (trajectories.decode_rank < torch.maximum(first, second)[:, None])
    log_p = predict(model, trajectories, masked, between, mask_id)       # (K, V)
    loss = row_mean(token_nll(log_p, trajectories.response[between]), between).mean()
    return loss, {"nll": loss.detach()}

def t3d_loss(model, trajectories, *, mask_id, generator=None, reference, a=0.5, b=0.1, c=0.2):
    """T3D (arXiv 2602.12262).  Relative to a reference (a `LaggedCopy`), raise log p of the
    recorded tokens x0, and lower that of y^, the reference's likeliest tokens.  Also learn x0 with
    weights from 1 (next) to 1/n_masked (last): L_path.  With l(y) = mean log p(y) of hidden tokens:
    L = -log sigma(b [l(x0) - l_ref(x0)]) - a log(1 - sigma(b [l(y^) - l_ref(y^)])) + c L_path."""
    rank, n = trajectories.decode_rank, trajectories.n_decoded
    masked, _ = cut(rank, draw_below(n, generator))
    log_p = predict(model, trajectories, masked, masked, mask_id)        # (K, V)
    with torch.no_grad():
        log_p_ref = predict(reference, trajectories, masked, masked, mask_id)

    def log_ratio(y):                                                    # l(y) - l_ref(y), (B,)
        return row_mean(token_nll(log_p_ref, y) - token_nll(log_p, y), masked)
    x_0, rejected = trajectories.response[masked], log_p_ref.argmax(-1)  # rejected: y^
    log_sigma = nn.functional.logsigmoid
    preference = -log_sigma(b * log_ratio(x_0)) - a * log_sigma(-b * log_ratio(rejected))
    weight = ((n[:, None] - rank).float() / masked.sum(1, True))[masked] # 1 .. 1/n_masked, (K,)
    path = row_mean(weight * token_nll(log_p, x_0), masked)
    loss = (preference + c * path).mean()
    return loss, {"preference": preference.mean().detach(), "path": path.mean().detach()}

class LaggedCopy:
    """A frozen copy of an nn.Module that catches up every `every` calls: the reference of T3D."""
    def __init__(self, model, every=10):
        self.model, self.every, self.calls = model, every, 0
        self.frozen = copy.deepcopy(model).eval()

    def __call__(self, tokens):
        if self.calls % self.every == 0:
            self.frozen.load_state_dict(self.model.state_dict())
        self.calls += 1
        return self.frozen(tokens)

# == 10. Settings and arms =========================================================================
# An arm is a way to train.  SFT, the usual one, learns given solutions (GT: ground truth) or own
# answers (SD: self-distilled).  The toy stands at the top of toy_data.py: pick asks for a factor
# and its product; in mul the factor is given; add is sums.  Arms train on pick; mul and add show
# what is forgotten.
@dataclass(frozen=True)
class Settings:
    learning_rate: float = 2e-5       # as in the paper, but for all weights (paper: LoRA, r = 16)
    batch_size: int = 32              # as in the paper
    epochs: int = 5                   # as in the paper
    window_size: int = 4              # W, of 12 tokens (paper: 32 of 256)
    margin: float = 1.0               # gamma, nats; chosen on validation (paper: 0.1 to 0.3)
    rank_weight: float = 1.0          # lambda (paper: 1 and 2)
    style: str = "other"              # format of given solutions: "own" is the base's format
    pretrain_updates: int = 4500      # after that, nearly all answers are right in the best order
    queries: int = 16_000             # to answer, each prompt several times (paper: 12-17K, once)
    temperature: float = 1.0          # for these answers; also makes orders differ (paper: low)
    keep: str = "right"               # what the checker accepts; "all" keeps every answer
    test_problems: int = 400          # for mul and add each; pick has 0.4 times this for each c
    split: str = "test"               # use "validation" to choose something by the figures

WORDS = {"style": ("other", "own"), "keep": ("right", "all"), "split": ("test", "validation")}
QUICK = ("pretrain_updates=60", "queries=100", "keep=all", "epochs=1", "test_problems=10")
ARMS = {  # name: what it learns from, by which loss, with which of the settings
    "No-SFT": ("own answers", None, []),
    "SFT-GT": ("given solutions", nelbo_loss, ["style"]),
    "SFT-SD": ("own answers", nelbo_loss, []),
    "dInfer": ("own answers", dinfer_loss, []),
    "T3D": ("own answers", t3d_loss, []),
    "masking": ("own answers", partial(tabom_loss, rank_weight=0), ["window_size", "margin"]),
    "TABOM": ("own answers", tabom_loss, ["window_size", "margin", "rank_weight"]),
    "shuffled": ("shuffled ranks", tabom_loss, ["window_size", "margin", "rank_weight"]),
}
DEFAULT_ARMS = ("No-SFT", "SFT-GT", "SFT-GT:style=own", "SFT-SD", "masking", "TABOM",
                "TABOM:margin=0.2", "shuffled")

def configure(assignments, settings=Settings(), names=tuple(vars(Settings()))):
    """["margin=0.3", ..] -> settings with these values, each of the type of its default."""
    values = {}
    for name, _, text in (assignment.partition("=") for assignment in assignments):
        require(name in names, f"{name!r} is not a setting here, only {', '.join(names)}.")
        kind, words = type(vars(settings)[name]), WORDS.get(name)
        lowest = 1 if kind is int else 0
        allowed = " or ".join(words) if words else f"{kind.__name__}, from {lowest} to 1e6"
        try:
            values[name] = kind(text)
            fits = text in words if words else lowest <= values[name] <= 1e6
        except ValueError:
            fits = False
        require(fits, f"{name} must be {allowed}, not {text!r}.")
    return replace(settings, **values)

def read_arm(name, settings):
    """As in "TABOM:margin=0.2" -> its line in ARMS and its settings; settings in the name win."""
    arm, _, own = name.partition(":")
    require(arm in ARMS, f"{arm!r} is not an arm, only {', '.join(ARMS)}.")
    names = ["learning_rate", "batch_size", "epochs", *ARMS[arm][2]] if ARMS[arm][1] else []
    return ARMS[arm], configure(own.split(",") if own else [], settings, names)

# == 11. The denoiser ==============================================================================
class Denoiser(nn.Module):
    """A bidirectional transformer: (B, L+N) -> (B, L+N, V).  [MASK] is token V, an input only."""
    def __init__(self, vocabulary_size, length, layers=3, width=96, heads=4):
        super().__init__()
        self.token = nn.Embedding(vocabulary_size + 1, width)
        self.position = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:                 # with GPT-2's 0.02 it learns more slowly
                nn.init.normal_(weight, std=0.05 if "blocks" in name else 0.1)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]  # (B, L+N, width)
        return self.head(self.blocks(x))         # (B, L+N, V); no causal mask: both sides are seen

# == 12. One training loop for pretraining and for every arm =======================================
say = partial(print, flush=True)
PURPOSES = ("batches", "masks", "collect", "data", "evaluate")

def random_stream(seed, purpose, device="cpu"):
    """A generator for each (seed, purpose), so that all arms get the same draws."""
    return torch.Generator(device).manual_seed(len(PURPOSES) * seed + PURPOSES.index(purpose))

@nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)      # the quickest for short rows on a CPU
def train(model, data, batches, loss_fn, optimizers, decay, seed, label):
    """Train in place on data[rows] for rows in batches: 50 updates of warm-up, then decay."""
    def rate(update):
        return min((update + 1) / 50, decay(max(0, update - 50) / max(1, len(batches) - 50)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    masks, seen = random_stream(seed, "masks", data.response.device), []
    model.train()
    for rows in tqdm(batches.to(data.response.device), label, leave=False, disable=None):
        loss, metrics = loss_fn(model, data[rows], mask_id=toy.MASK_ID, generator=masks)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        seen.append(metrics)
    model.eval()
    quarter = math.ceil(len(seen) / 4)
    first, last = ({name: sum(x[name] for x in part) / quarter for name in metrics}
                   for part in (seen[:quarter], seen[-quarter:]))
    say(f"    {label}: " + ", ".join(f"{x} {first[x]:.3f} -> {last[x]:.3f}" for x in metrics))

def pretrain(corpus, odds, updates, seed):
    """A Denoiser, trained by Eq. 1.  Muon for the matrices of the blocks, AdamW for all else."""
    torch.manual_seed(seed)                      # the initial weights
    model = Denoiser(len(toy.VOCABULARY), corpus.shape[1]).to(corpus.device)
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
    others = [weight for name, weight in model.named_parameters()
              if weight.dim() < 2 or not name.startswith("blocks")]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2),
                  torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98))]
    batches = torch.multinomial(odds, updates * 64, replacement=True,
                                generator=random_stream(seed, "batches")).view(updates, 64)
    train(model, solved(corpus), batches, nelbo_loss, optimizers,
          lambda x: 1 - x, seed, "pretraining")  # linear: better here than a cosine
    return model

def fine_tune(name, base, kept, queries, settings, seed):
    """A copy of the base, trained as an arm says.  AdamW, warm-up and cosine decay are as in the
    paper.  Every arm gets as many updates as `epochs` passes over the kept answers take."""
    (source, loss_fn, names), own = read_arm(name, settings)
    model = copy.deepcopy(base)
    if loss_fn is None:
        return model
    draws, order = random_stream(seed, "data", queries.device), random_stream(seed, "batches")
    data = {"own answers": kept,                 # solutions are given for all queries
            "given solutions": solved(toy.given_solutions(queries, own.style, draws)),
            "shuffled ranks": replace(kept, decode_rank=shuffled(kept.decode_rank, draws))}[source]
    loss_settings = {setting: vars(own)[setting] for setting in names if setting != "style"}
    if loss_fn is t3d_loss:
        loss_settings["reference"] = LaggedCopy(model)
    updates = max(1, own.epochs * len(kept) // own.batch_size)
    passes = torch.cat([torch.randperm(len(data), generator=order) for _ in range(own.epochs)])
    optimizer = torch.optim.AdamW(model.parameters(), own.learning_rate)
    train(model, data, passes[:updates * own.batch_size].view(updates, -1),
          partial(loss_fn, **loss_settings), [optimizer],
          lambda x: 0.5 + 0.5 * math.cos(math.pi * x), seed, name)
    return model

# == 13. Answer, check, measure ====================================================================
def solved(rows):
    """Rows as Trajectories.  No model decoded them, so their ranks count from the left."""
    return from_steps(*toy.prompt_and_response(rows), torch.where(toy.is_given(rows), -1, 0))

def rows_of(trajectories):
    return torch.cat([trajectories.prompt, trajectories.response], 1)

def answer(model, problems, **settings):
    """Decode problems (n, L+N) -> Trajectories, right (n,) bool.  Settings as in `decode`."""
    answers = Trajectories.cat([
        decode(model, prompt, given.shape[1], mask_id=toy.MASK_ID, given=given, **settings)
        for prompt, given in map(toy.prompt_and_response, problems.split(250))])
    return answers, toy.is_correct(rows_of(answers))

def evaluate(model, tests, seed):
    """-> all figures of a model, its greedy answers to pick, and which of them are right."""
    pick = tests["pick"]
    def percent(right):
        return 100 * right.float().mean().item()
    def sampling():                              # the same draws each time
        return {"temperature": 1.0, "generator": random_stream(seed, "evaluate", pick.device)}
    choosing = pick[toy.n_choices(pick) > 1]
    some = toy.first_of_each(choosing, 20).repeat_interleave(16, 0)
    answers, right = answer(model, pick)
    samples, sampled = answer(model, some, **sampling())
    best = answer(model, choosing, order=toy.best_order)[1]
    best_sampled = answer(model, choosing, order=toy.best_order, **sampling())[1]
    by_c = toy.by_choices(pick, right)
    states = replay(model, answers[::4], mask_id=toy.MASK_ID)            # every fourth answer
    return {"own order": by_c.pop("2-5"), "sampled": percent(sampled),
            "best order": percent(best), "best order, sampled": percent(best_sampled),
            **{domain: percent(answer(model, tests[domain])[1]) for domain in ("mul", "add")},
            "pass@16": percent(sampled.view(-1, 16).any(1)),
            "right factors": toy.distinct_right_factors(rows_of(samples), sampled, 16),
            "TDS": discrimination_score(states).item(), "by c": by_c}, answers, right

# == 14. The demo, in five parts ===================================================================
DIFFERENCES = {  # of two arms in own order, and what they show
    ("SFT-SD", "No-SFT"): "own right answers", ("masking", "SFT-SD"): "recorded cuts",
    ("TABOM", "masking"): "ranking, margin chosen on validation",
    ("TABOM:margin=0.2", "masking"): "ranking, the paper's margin",
    ("TABOM", "No-SFT"): "all of TABOM"}

def compare(runs):
    """[{arm: figures}, one per seed] -> the table of means, and differences in own order."""
    means = {arm: [sum(run[arm][name] for run in runs) / len(runs) for name in toy.FIGURES]
             for arm in runs[0]}
    lines = [[arm, *row[:-1], f"{row[-1]:.3f}"] for arm, row in means.items()]
    differences = [[f"{what}: {a} minus {b}", f"{means[a][0] - means[b][0]:+.1f}"]
                   for (a, b), what in DIFFERENCES.items() if a in means and b in means]
    return (toy.table([["", *toy.FIGURES], *lines]) + "\n\n"
            + toy.table([["Differences in own order:", ""], *differences]))

def film(pick, base, tuned):
    """How two models, each (model, answers, right), answered one of the prompts."""
    (_, before, base_right), (_, after, tuned_right) = base, tuned
    only_tuned = tuned_right & ~base_right
    if not only_tuned.any():
        return "There is no prompt that TABOM gets right and the base does not."
    waits = (after.decode_rank - before.decode_rank).amax(1)
    row = waits.where(only_tuned, -99).argmax()
    pictures = [toy.draw_states(rows_of(answers)[row], answers.decode_rank[row], [
        entropy[0] for _, entropy in replay(model, answers[row:row + 1], mask_id=toy.MASK_ID)])
        for model, answers, _ in (base, tuned)]
    return (f"Right only with TABOM. Longest wait: it writes one digit {waits[row]} steps later.\n"
            + toy.side_by_side(pick[row], *pictures))

def run_seed(seed, arms, settings, device, made_by, folder):
    """All parts with one seed -> {arm: figures}."""
    corpus, odds, problems = toy.split_problems(seed)
    parts, count = problems[settings.split], settings.test_problems
    tests = {"pick": toy.first_of_each(parts["pick"], math.ceil(0.4 * count)).to(device),
             "mul": parts["mul"][:count].to(device), "add": parts["add"][:count].to(device)}
    run = {"seed": seed, "settings": vars(settings), "made by": made_by, "arms": {}}
    say(f"\nPart 1, seed {seed}: pretrain. nll: cross-entropy, first -> last quarter of updates.")
    base = pretrain(corpus.to(device), odds, settings.pretrain_updates, seed)
    store(folder, f"seed-{seed}-base.pt", base.state_dict())

    say("\nPart 2: why order matters. 41 x (digits 4 to 6) asks for a factor with such digits.\n"
        "    Percent right by c, the number of digits to choose from. own: surest first; best:\n"
        "    factor first. gap: lowest entropy in the factor minus the lowest elsewhere.")
    pick = tests["pick"]
    orders = {"own": {}, "left to right": {"block_length": 1}, "best": {"order": toy.best_order}}
    by_c = {name: toy.by_choices(pick, answer(base, pick, **order)[1])
            for name, order in orders.items()}
    _, entropy = next(replay(base, solved(pick), mask_id=toy.MASK_ID))   # at the start
    gap = toy.by_choices(pick, toy.entropy_gap(pick, entropy))
    say(toy.table([["c =", *gap], *([name, *right.values()] for name, right in by_c.items()),
                   ["gap", *(f"{nats:.2f}" for nats in gap.values())]]))

    say("\nPart 3: record, check, keep. The base answers queries of pick with sampled tokens.")
    queries = problems["query"]["pick"].to(device)
    queries = queries[torch.arange(settings.queries, device=device) % len(queries)]
    rollouts, right = answer(base, queries, temperature=settings.temperature,
                             generator=random_stream(seed, "collect", device))
    kept = rollouts[right] if settings.keep == "right" else rollouts
    step = rollouts.decode_rank[toy.columns_of(queries) == toy.PRODUCT[0]].float()
    say(f"    kept {len(kept)} of {len(rollouts)}, each with its order. Tokens written before the\n"
        f"    product: right answers {step[right].mean():.1f}, others {step[~right].mean():.1f}.")
    require(len(kept) >= 16, "too few to train on: raise pretrain_updates or queries.")

    say("\nPart 4: fine-tune copies of the base. rank_loss: Eq. 8. pair_accuracy: pairs in\n"
        "    recorded order, high at first. Does ranking hold it up? Compare masking, TABOM.\n\n"
        "    SFT-GT    hides random tokens of solutions in another format (style=own: the base's)\n"
        "    SFT-SD    hides random tokens of the kept answers\n"
        "    masking   hides what was written after a random moment, and learns the next tokens\n"
        "    TABOM     as masking, and ranks: tokens written earlier should have lower entropy\n"
        "    shuffled  as TABOM, with random ranks: random cuts, too\n")
    judged = {}
    for name, (_, own) in arms.items():
        model = fine_tune(name, base, kept, queries, settings, seed)
        figures, answers, right = evaluate(model, tests, seed)
        judged[name] = model, answers, right
        run["arms"][name] = {"settings": vars(own), **figures}
        store(folder, f"seed-{seed}.json", run)
        if name == "TABOM":
            store(folder, f"seed-{seed}-TABOM.pt", model.state_dict())

    say("\nPart 5: compare. A difference below 5 points may be noise of the seed.\n")
    say("\n".join(f"    {name:20}{meaning}" for name, meaning in toy.FIGURES.items())
        + "\n\n" + compare([run["arms"]]))
    if "TABOM" in judged:
        say("\n" + film(pick, judged["No-SFT"], judged["TABOM"]))
    return run["arms"]

# == 15. The command line ==========================================================================
def store(folder, name, content):
    """Write a .json or .pt under another name, then rename it.  So `name` is always complete."""
    if folder:
        unfinished = folder / f".{name}"
        try:
            if name.endswith(".pt"):
                torch.save(content, unfinished)
            else:
                unfinished.write_text(json.dumps(content, indent=1, allow_nan=False))
            unfinished.replace(folder / name)
        finally:
            unfinished.unlink(missing_ok=True)

def demo(options):
    """Find out what is wrong before any work, then run the seeds."""
    require(toy, "toy_data.py is missing; it belongs beside tabom.py.")
    settings = configure([*(QUICK if options.quick else ()), *options.set])
    arms = {name: read_arm(name, settings) for name in ("No-SFT", *options.arms)}
    require(len(set(options.seeds)) == len(options.seeds) and 0 <= min(options.seeds)
            and max(options.seeds) < 10 ** 6, "--seeds must be different numbers from 0 to 999999.")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {options.device}: PyTorch finds no such device.") from None
    if options.out:
        options.out.mkdir(parents=True)          # a folder that exists is an error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    made_by = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    say(f"TABOM on synthetic arithmetic: {made_by}")
    say("--quick trains far too little: the figures below mean nothing.\n" * options.quick, end="")
    runs = [run_seed(seed, arms, settings, device, made_by, options.out) for seed in options.seeds]
    if len(runs) > 1:
        say(f"\nMeans over the seeds {options.seeds}\n\n" + compare(runs))

def main(arguments):
    """Run the command line -> exit code: 0, 2 for errors the user can fix, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="tabom.py", description="TABOM on synthetic arithmetic, beside other arms.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"arms: {', '.join(ARMS)}\n\n"
        "settings, with defaults and reasons:\n" + inspect.getsource(Settings).split(":\n", 1)[1])
    add = parser.add_argument
    add("--demo", action="store_true", required=True, help="run all five parts")
    add("--quick", action="store_true", help="takes a minute; shows only that the demo runs")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    add("--arms", nargs="+", default=DEFAULT_ARMS, metavar="ARM", help="rows of the table, each a "
        f"name or NAME:setting=value,..; default: {' '.join(DEFAULT_ARMS)}")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="for every arm whose name does not set it")
    add("--out", type=Path, metavar="FOLDER", help="a new folder, for figures and weights")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    try:
        demo(parser.parse_args(arguments or ["--help"]))
    except BrokenPipeError:
        sys.stdout = None                        # `| head` has closed it
    except (ValueError, OSError) as error:
        print(f"tabom.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntabom.py: stopped; every file in --out is complete.", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
