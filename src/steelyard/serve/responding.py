"""A response as it grows: from the text of a model to items, and the events that tell of them.

Knows neither the engine nor HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from steelyard.serve.ids import fresh
from steelyard.serve.protocol.chat import ChosenToken
from steelyard.serve.protocol.response_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    ItemEvent,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
)
from steelyard.serve.protocol.response_object import (
    FunctionCall,
    IncompleteDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    Status,
)
from steelyard.serve.protocol.tools import call_id
from steelyard.serve.protocol.usage import Finish
from steelyard.text.reasoning import Answered, ReasoningReader, Thought
from steelyard.text.tool_calls import Arguments, Begun, CallReader, Said


class Growing:
    """A response from its first token to its end.

    Args:
        response: as it begins.
        calls: whether there may be calls of tools in the text.
        thoughts: what parts thoughts from the answer; None: there are none.
    """

    def __init__(self, response: ResponseObject, calls: bool, thoughts: ReasoningReader | None = None) -> None:
        self.response = response
        self.thought = ""
        self._thoughts = thoughts
        self._reader = CallReader() if calls else None
        self._items: list[OutputItem] = []
        self._open = False
        """Whether the last item may get more;"""
        self._texts: list[str] = []
        """what it has so far, as text,"""
        self._scored: list[ChosenToken] = []
        """and its tokens."""
        self._cut = False
        self._number = -1

    def begin(self) -> Iterator[ResponseEvent]:
        """What is told before all."""
        yield ResponseCreated(sequence_number=self._next(), response=self.response)
        yield ResponseInProgress(sequence_number=self._next(), response=self.response)

    def push(self, text: str, scored: list[ChosenToken], reason: Finish | None) -> Iterator[ItemEvent]:
        """More text, with its tokens if they are asked for, and why it ends if it does."""
        if self._thoughts is not None:
            pieces = [*self._thoughts.push(text), *(self._thoughts.flush() if reason is not None else [])]
            for thought in pieces:
                if isinstance(thought, Thought):
                    yield from self._think(thought.text)
            text = "".join(piece.text for piece in pieces if isinstance(piece, Answered))
            scored = scored if text else []
        if self._reader is None:
            if self._thoughts is None or text:
                yield from self._say(text, scored)
        else:
            for piece in [*self._reader.push(text), *(self._reader.flush() if reason is not None else [])]:
                match piece:
                    case Said(said):
                        if said:
                            yield from self._say(said, [])
                    case Begun(_, name):
                        yield from self._close("completed")
                        yield self._add(FunctionCall(fresh("fc_"), call_id(), name, "", "in_progress"))
                    case Arguments(_, given):
                        yield from self._argue(given)
        if reason is not None:
            if not self._items:
                yield from self._say("", [])
            self._cut = reason == "length"
            whole = self._reader is None or self._reader.whole == self._reader.calls
            is_call = isinstance(self._items[-1], FunctionCall)
            yield from self._close("completed" if not self._cut or (is_call and whole) else "incomplete")

    def end(self, usage: ResponseUsage, now: int) -> ResponseObject:
        """The whole response."""
        cut = IncompleteDetails() if self._cut else None
        self.response = msgspec.structs.replace(
            self.response,
            status="incomplete" if self._cut else "completed",
            completed_at=None if self._cut else now,
            incomplete_details=cut,
            output=self._items,
            usage=usage,
        )
        return self.response

    def ended(self) -> ResponseCompleted | ResponseIncomplete:
        """What is told at the end."""
        kind = ResponseIncomplete if self._cut else ResponseCompleted
        return kind(sequence_number=self._next(), response=self.response)

    def failed(self, message: str) -> ResponseFailed:
        """What is told if there is no end."""
        if self._open:
            self._items[-1] = self._grown("incomplete")
        self.response = msgspec.structs.replace(
            self.response,
            status="failed",
            completed_at=None,
            error=ResponseError(message),
            incomplete_details=None,
            output=self._items,
        )
        return ResponseFailed(sequence_number=self._next(), response=self.response)

    def _next(self) -> int:
        self._number += 1
        return self._number

    @property
    def _place(self) -> int:
        return len(self._items) - 1

    def _add(self, item: OutputItem) -> OutputItemAdded:
        self._items.append(item)
        self._open, self._texts, self._scored = True, [], []
        return OutputItemAdded(sequence_number=self._next(), output_index=self._place, item=item)

    def _say(self, text: str, scored: list[ChosenToken]) -> Iterator[ItemEvent]:
        if not self._open or not isinstance(self._items[-1], OutputMessage):
            yield from self._close("completed")
            yield self._add(OutputMessage(fresh("msg_"), "in_progress", []))
            yield ContentPartAdded(**self._of(), part=OutputText(""))
        if text or scored:
            self._texts.append(text)
            self._scored += scored
            yield OutputTextDelta(**self._of(), delta=text, logprobs=scored)

    def _think(self, text: str) -> Iterator[ItemEvent]:
        self.thought += text
        if not self._open:
            yield self._add(ReasoningItem(fresh("rs_"), "in_progress", []))
            yield ContentPartAdded(**self._of(), part=ReasoningText(""))
        self._texts.append(text)
        yield ReasoningTextDelta(**self._of(), delta=text)

    def _argue(self, given: str) -> Iterator[ItemEvent]:
        self._texts.append(given)
        yield ArgumentsDelta(**self._of(), delta=given)

    def _close(self, status: Status) -> Iterator[ItemEvent]:
        """End the last item, if it has not ended."""
        if not self._open:
            return
        item = self._items[-1] = self._grown(status)
        self._open = False
        if isinstance(item, OutputMessage):
            (part,) = item.content
            yield OutputTextDone(**self._of(), text=part.text, logprobs=part.logprobs)
            yield ContentPartDone(**self._of(), part=part)
        elif isinstance(item, ReasoningItem):
            (thought,) = item.content
            yield ReasoningTextDone(**self._of(), text=thought.text)
            yield ContentPartDone(**self._of(), part=thought)
        else:
            yield ArgumentsDone(**self._of(), name=item.name, arguments=item.arguments)
        yield OutputItemDone(sequence_number=self._next(), output_index=self._place, item=item)

    def _grown(self, status: Status) -> OutputItem:
        """The last item with what it has come to."""
        item, text = self._items[-1], "".join(self._texts)
        if isinstance(item, OutputMessage):
            return msgspec.structs.replace(item, status=status, content=[OutputText(text, logprobs=self._scored)])
        if isinstance(item, ReasoningItem):
            return msgspec.structs.replace(item, status=status, content=[ReasoningText(text)])
        return msgspec.structs.replace(item, status=status, arguments=text)

    def _of(self) -> dict[str, Any]:
        """What every event of the last item has."""
        item = self._items[-1]
        return {"sequence_number": self._next(), "output_index": self._place, "item_id": item.id}
