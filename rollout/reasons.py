"""Why an engine does not do what it is asked: kept once, raised anew for every caller."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.vllm_plugin.record import EngineDiedError, EngineError


@dataclass(frozen=True, slots=True)
class Reason:
    """What happened, and the exception behind it."""

    message: str
    cause: BaseException | None = None
    kind: type[EngineError] = EngineError

    def error(self) -> EngineError:
        """A new exception per caller: one that is raised twice would gather both tracebacks."""
        behind = "" if self.cause is None else f": {type(self.cause).__name__}: {self.cause}"
        error = self.kind(self.message + behind)
        error.__cause__ = self.cause
        return error


class StepFailed(BaseException):
    """A step failed; the cause says how. Not an Exception: no command in which it happens may take it for its own."""

    @property
    def reason(self) -> Reason:
        return Reason("the engine's thread died in a step", self.__cause__, EngineDiedError)
