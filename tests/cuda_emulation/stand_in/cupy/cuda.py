"""One device and its streams."""

from __future__ import annotations

from typing import Any

#: The stream that was current at each allocation, for tests to look at.
allocated: list[int] = []
#: (direction, bytes) of each copy between host and device.
copied: list[tuple[str, int]] = []
_current = [0]


class Device:
    def __init__(self, id: int) -> None:
        self.id = id

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Stream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    @classmethod
    def from_external(cls, stream: Any) -> Stream:
        return cls(stream.__cuda_stream__()[1])

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> Stream:
        _current.append(self.ptr)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()


def get_current_stream() -> Stream:
    return Stream(_current[-1])
