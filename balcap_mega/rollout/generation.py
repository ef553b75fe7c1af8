"""One round of captions in a vLLM engine: prompts go in while earlier ones generate, captions come out as they end."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from balcap_mega.rollout.requests import RenderedPrompt, RolloutRequest
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord

ENDS = {"stop": True, "length": False}
"""vLLM's reasons why a caption is over, and whether it is whole then. Any other one says that something failed."""

MOST_BYTES = 8 * 2**30
"""Of processed images that vLLM has at a time on a rank: each stays with its request until the last caption ends."""

STEPS_WAITING = 2
"""Engine steps whose worth of prompts waits in vLLM's queue while there are more."""

OnFinished = Callable[[int, int, Rollout], None]
"""(the prompt's place, rollout number, rollout), called as soon as one caption is finished, while others generate."""

Submit = Callable[[str, RolloutRequest], tuple[str, RenderedPrompt]]
"""(name, request) -> vLLM's own name for it, and what was submitted."""


@dataclass
class _Group:
    """One request that vLLM has, or had; its picture is not kept.

    tokens: of its prompt; nbytes: of its image's tensors
    begun:  the engine has drawn the first token of one of its captions
    """

    place: int
    seen: SeenRecord
    tokens: int
    nbytes: int
    begun: bool = False
    prompt_token_ids: tuple[int, ...] = ()
    captions: dict[int, Rollout] = field(default_factory=dict)


class Generation:
    """`count` captions of each request, for one call of `run`.

    Which captions share a batch decides their last bits, so it must not hang on how fast pictures come: requests are
    submitted by what has begun, not by the clock. The queue always holds more prompts than the next engine step of
    `step_tokens` tokens can take, or all that are left: vLLM schedules as if it had been given everything at first.
    Processed images of `MOST_BYTES` at most are with it at a time, or of one request.
    """

    def __init__(self, llm: Any, submit: Submit, rollout: Callable[[Any], Rollout], count: int, step_tokens: int):
        self.llm, self.count = llm, count
        self._submit, self._rollout = submit, rollout
        self._most_waiting = STEPS_WAITING * step_tokens
        self._groups: list[_Group] = []
        self._names: list[str] = []
        self._waiting, self._held = 0, 0  # tokens of prompts not begun, bytes of images not done with

    def run(
        self, requests: Iterable[RolloutRequest], timeout_seconds: float, on_finished: OnFinished | None
    ) -> list[RolloutGroup]:
        """The groups, in the requests' order.

        Raises TimeoutError after `timeout_seconds`, and RuntimeError where vLLM gives a caption up; the engine then has
        nothing left to do.
        """
        deadline, coming = time.monotonic() + timeout_seconds, iter(requests)
        try:
            self._submit_next(coming)
            while self.llm.has_unfinished_requests():
                if time.monotonic() > deadline:
                    raise TimeoutError(self._waited_for(timeout_seconds))
                for output in self.llm.step():
                    self._take(output, on_finished)
                self._submit_next(coming)
        except BaseException:
            self.llm.abort_request(self._names, internal=True)
            raise
        return [
            RolloutGroup(
                group.place,
                group.prompt_token_ids,
                tuple(group.captions[number] for number in range(self.count)),
                group.seen,
            )
            for group in self._groups
        ]

    def _submit_next(self, coming: Iterator[RolloutRequest]) -> None:
        """Submit what there is room for."""
        while self._waiting < self._most_waiting and (self._held < MOST_BYTES):
            if (request := next(coming, None)) is None:
                return
            name, rendered = self._submit(str(len(self._groups)), request)
            self._names.append(name)
            seen = SeenRecord.of(request.record_index, request.record)
            self._groups.append(_Group(request.place, seen, rendered.tokens, rendered.nbytes))
            self._waiting += rendered.tokens
            self._held += rendered.nbytes

    def _take(self, output: Any, on_finished: OnFinished | None) -> None:
        """What vLLM says of one request: that a caption begins, or ends."""
        group = self._groups[int(output.request_id)]
        if not group.begun:
            group.begun = True
            group.prompt_token_ids = tuple(output.prompt_token_ids)
            self._waiting -= group.tokens
        for completion in output.outputs:
            if completion.finish_reason is None:
                continue
            if completion.finish_reason not in ENDS:
                raise RuntimeError(
                    f"vLLM gave up caption {completion.index} of record {group.seen.index} "
                    f"({completion.finish_reason}): what there is of it is no sample of the policy"
                )
            rollout = group.captions[completion.index] = self._rollout(completion)
            if len(group.captions) == self.count:
                self._held -= group.nbytes
            if on_finished is not None:
                on_finished(group.place, completion.index, rollout)

    def _waited_for(self, seconds: float) -> str:
        waiting = [str(group.seen.index) for group in self._groups if len(group.captions) < self.count]
        shown = ", ".join(waiting[:8]) + (", ..." if len(waiting) > 8 else "")
        return (
            f"rollout.timeout_seconds={seconds} passed with {sum(len(group.captions) for group in self._groups)} of "
            f"{self.count * len(self._groups)} captions finished; still waiting for {len(waiting)} records ({shown})"
        )
