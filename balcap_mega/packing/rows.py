"""The packed row, which is one microbatch of the policy."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """S tokens of one or more groups, each group's prefix (image and prompt) once, then its captions.

    tokens:        [S] int64 ids, padded at the end
    position_ids:  [3, S] int64 rotary positions (temporal, height, width); equal in all three for text and LLaVA
    segments:      [M, 4] int32 rows (start, stop, prefix_start, prefix_stop): tokens start:stop attend to
                   prefix_start:prefix_stop in full and to themselves causally; a prefix has an empty prefix
    images:        for each image in order of appearance, the prompt it belongs to (index into the step's groups)
    hidden_rows:   [R] int64, index in the row of the hidden state that predicts each response token. The last prefix
                   token predicts the first token of every caption of its group, so indices repeat
    targets:       [R] int64 response tokens
    sequence_ids:  [R] int64, which rollout of the step's N each response token belongs to
    token_index:   [R] int64, the token's place within its rollout's response
    """

    tokens: Tensor
    position_ids: Tensor
    segments: Tensor
    images: tuple[int, ...]
    hidden_rows: Tensor
    targets: Tensor
    sequence_ids: Tensor
    token_index: Tensor
