"""Records of token ids that somebody else has made: all that they say is kept or refused."""

from typing import Any

from whet.chat.conversation import LARGEST_WEIGHT, Origin, Tokenised, shown
from whet.data.record import UNUSED, Record, first_of, rest

IDS_KEYS = ("ids", "input_ids", "tokens")
MASK_KEYS = ("mask", "loss_mask", "assistant_masks", "completion_mask", "labels")
IGNORED_LABEL = -100
WEIGHT_KEYS = ("loss_weights", "loss_weight", "loss_scale", "token_weights", "weights", "weight")
DOCUMENT_KEYS = ("segment_ids", "document_ids", "doc_ids", "sequence_ids")
LENGTHS_KEYS = ("seq_lengths", "cu_seqlens", "sequence_lengths")
OF_EACH = ("attention_mask", "position_ids", "token_type_ids", *DOCUMENT_KEYS)


def read_tokenised(record: Record, at: Origin) -> Tokenised:
    """Ids and weights as the record has them, without its padding."""
    ids_key = first_of(record, IDS_KEYS) or ""
    mask_key = first_of(record, MASK_KEYS) or ""
    ids = _numbers(record, ids_key, at)
    if not ids:
        raise at.error(f"{ids_key} is empty")
    mask = _mask(record, mask_key, ids, at)
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= 2**31:
        wrong = next(i for i in ids if not isinstance(i, int) or not 0 <= i < 2**31)
        raise at.error(f"{ids_key} must hold token ids, got {shown(wrong)}")
    for other in MASK_KEYS:
        if other == mask_key or record.get(other) is None:
            continue
        if [w > 0 for w in _mask(record, other, ids, at)] != [w > 0 for w in mask]:
            raise at.error(f"{mask_key} and {other} train other tokens{UNUSED % other}")
    begin, end = _not_padding(record, ids, mask, at)
    _check_one_document(record, len(ids), begin, end, at)
    used = (ids_key, *MASK_KEYS, *OF_EACH, *LENGTHS_KEYS)
    return Tokenised(ids[begin:end], mask[begin:end], at, rest(record, *used))


def _mask(record: Record, key: str, ids: list[int], at: Origin) -> list[float]:
    """The weight of each token, from a mask or from labels."""
    mask = _numbers(record, key, at, len(ids))
    if key == "labels":
        return _mask_of_labels(ids, mask, at)
    if not all(0 <= weight <= LARGEST_WEIGHT for weight in mask):
        wrong = next(m for m in mask if not 0 <= m <= LARGEST_WEIGHT)
        raise at.error(f"{key} must hold finite weights of 0 or more, got {shown(wrong)}")
    return list(map(float, mask))


def _mask_of_labels(ids: list[int], labels: list[int], at: Origin) -> list[float]:
    """Labels in transformers' sense: the id where it is trained, -100 where not, not shifted."""
    for number, (token, label) in enumerate(zip(ids, labels, strict=True), 1):
        if label not in (token, IGNORED_LABEL):
            raise at.error(
                f"label {number} is {shown(label)}, neither the id {token} of its place nor "
                f"{IGNORED_LABEL}; labels must not be shifted"
            )
    return [float(label != IGNORED_LABEL) for label in labels]


def _numbers(record: Record, key: str, at: Origin, length: int | None = None) -> list[Any]:
    values = record[key]
    if not isinstance(values, list):
        raise at.error(f"{key} must be a list of numbers, got {shown(values)}")
    if not set(map(type, values)) <= {int, float}:  # one by one takes ten times as long
        for value in values:
            is_id = key == "labels" or key in IDS_KEYS  # in a mask true is 1
            if not isinstance(value, int | float) or (isinstance(value, bool) and is_id):
                raise at.error(f"{key} must hold numbers alone, got {shown(value)}")
    if length is not None and len(values) != length:
        raise at.error(f"{first_of(record, IDS_KEYS)} has {length} entries, {key} {len(values)}")
    return values


def _not_padding(record: Record, ids: list[int], mask: list[float], at: Origin) -> tuple[int, int]:
    """Begin and end of the tokens to which the record's `attention_mask` attends: all without."""
    if record.get("attention_mask") is None:
        return 0, len(ids)
    attended = _numbers(record, "attention_mask", at, len(ids))
    seen = [i for i, value in enumerate(attended) if value]
    if not seen or len(seen) != seen[-1] - seen[0] + 1 or set(attended) - {0, 1}:
        raise at.error("attention_mask must be 1 for the tokens of one text and 0 for its padding")
    begin, end = seen[0], seen[-1] + 1
    if any(mask[:begin]) or any(mask[end:]):
        raise at.error("a token is trained where attention_mask is 0, that is padding")
    return begin, end


def _check_one_document(record: Record, length: int, begin: int, end: int, at: Origin) -> None:
    """Refuse several texts in one record: they would see each other."""
    several = "holds several texts, packed by somebody else; write each of them as a line"
    if record.get("position_ids") is not None:
        positions = _numbers(record, "position_ids", at, length)[begin:end]
        wrong = [n for n, position in enumerate(positions) if position != n]
        if wrong and positions[wrong[0]] == 0:
            raise at.error(f"position_ids begin again at {begin + wrong[0] + 1}: it {several}")
        if wrong:
            raise at.error(
                f"position {begin + wrong[0] + 1} of position_ids is {shown(positions[wrong[0]])}; "
                "a text's positions count from 0"
            )
    for key in LENGTHS_KEYS:
        lengths = record.get(key) or []
        if len(lengths if isinstance(lengths, list) else [lengths]) > 1 + (key == "cu_seqlens"):
            raise at.error(f"{key} has several entries: it {several}")
    for key in DOCUMENT_KEYS:
        numbers = _numbers(record, key, at, length) if record.get(key) is not None else []
        if len(set(numbers[begin:end])) > 1:
            raise at.error(f"{key} differ: it {several}")
    if record.get("token_type_ids") and any(_numbers(record, "token_type_ids", at)):
        raise at.error(f"token_type_ids are not read{UNUSED % 'token_type_ids'}")
    if found := [key for key in WEIGHT_KEYS if isinstance(record.get(key), list)]:
        raise at.error(f"{found[0]}: weights of tokens are read as `loss_mask`{UNUSED % found[0]}")
