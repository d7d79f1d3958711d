"""Teaches a text encoder to read before it trains along with a denoiser: which scene does a caption describe?

A denoiser alone teaches its text encoder no order of words, since every word's own colour is most of what it can use:
after 12,000 steps "red" was the same vector, within 0.1 %, whether the circle was red or what is behind it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgld.models.embedded import attributes as attr
from sgld.models.embedded.attributes import Scene
from sgld.models.embedded.datasets import CAPTIONS_EACH, Captioned

PEAK_RATE = 1e-3
WARMUP_STEPS = 100
# No attribute has more values than there are motions.
MAX_VALUES = len(attr.MOTIONS)
BELOW, RIGHT_OF = attr.RELATIONS.index("below"), attr.RELATIONS.index("right of")


class Reader(nn.Module):
    """One query for each attribute looks through the words, and what it finds is classified; thrown away afterwards.

    Nothing but attention lies between words and values, so it is the encoder that has to find out what belongs where.
    """

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(Scene._fields), width) / width**0.5)
        self.values = nn.Parameter(torch.randn(len(Scene._fields), MAX_VALUES, width) / width**0.5)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, fields of Scene, MAX_VALUES) of encoded words (B, L, width), where `mask` (B, L) is True."""
        scores = (words @ self.queries.T).masked_fill(~mask[:, :, None], float("-inf"))
        found = scores.softmax(1).transpose(1, 2) @ words
        return torch.einsum("bfw,fvw->bfv", found, self.values)


def readable(scenes: Tensor) -> Tensor:
    """Scenes (B, fields of Scene) as a caption tells them: which of a pair it names first is its own choice.

    The upper or the left one comes first here.
    """
    columns = {name: index for index, name in enumerate(Scene._fields)}
    swapped = scenes.clone()
    for one, other in (("colour", "other_colour"), ("shape", "other_shape")):
        swapped[:, columns[one]], swapped[:, columns[other]] = scenes[:, columns[other]], scenes[:, columns[one]]
    relation = scenes[:, columns["relation"]]
    swapped[:, columns["relation"]] = relation ^ 1
    is_swapped = (relation == BELOW) | (relation == RIGHT_OF)
    return torch.where(is_swapped[:, None], swapped, scenes)


def encode_words(text: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's output (B, L, width) for tokens (B, L), and where there are words."""
    mask = tokens != 0
    return text(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float(), mask


def train_reader(text: nn.Module, captioned: Captioned, *, width: int, batch_size: int, num_steps: int) -> Reader:
    """Trains the encoder where it is, and a reader on top, which it returns.

    What a caption leaves out can't be read from it: the loss then asks for the usual values, which does no harm.
    """
    device = next(text.parameters()).device
    text.train()
    reader = Reader(width).to(device)
    scenes, tokens = readable(captioned.scenes).to(device), captioned.tokens.to(device)
    parameters = [*text.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=num_steps + 1, pct_start=min(0.5, WARMUP_STEPS / num_steps)
    )
    for step in range(num_steps):
        rows = torch.randint(len(scenes), (batch_size,), device=device)
        which = torch.randint(CAPTIONS_EACH, (batch_size,), device=device)
        logits = reader(*encode_words(text, tokens[rows, which]))
        loss = functional.cross_entropy(logits.flatten(0, 1), scenes[rows].flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == num_steps - 1:
            print(f"step {step:6d}  reading loss {loss.item():.4f}", flush=True)
    return reader
