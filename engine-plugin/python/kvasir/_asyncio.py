"""The client for asyncio."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvasir._native import Chunk, Client, Layout, Profile

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvasir._native import Level, Tensor


class AsyncClient:
    """As `Client`, with calls to be awaited. Cancelling one ends it."""

    def __init__(
        self,
        endpoint: str = "127.0.0.1:7420",
        *,
        call_timeout: float | None = None,
        transfer_timeout: float | None = None,
    ) -> None:
        self._client = Client(
            endpoint, call_timeout=call_timeout, transfer_timeout=transfer_timeout
        )

    async def lookup(self, keys: Sequence[bytes]) -> int:
        return await self._client.lookup_async(keys)

    async def put(
        self,
        key: bytes,
        layout: Layout,
        data: "Buffer | Tensor",
        *,
        encoding: "Level" = "raw",
        profile: Profile | None = None,
        start: int = 0,
        durable: bool = True,
    ) -> bool:
        return await self._client.put_async(
            key,
            layout,
            data,
            encoding=encoding,
            profile=profile,
            start=start,
            durable=durable,
        )

    async def get(
        self,
        keys: Sequence[bytes],
        *,
        finest: "Level | None" = None,
        timeout: float | None = None,
    ) -> list[Chunk]:
        return await self._client.get_async(keys, finest=finest, timeout=timeout)

    async def put_profile(self, profile: Profile) -> bool:
        return await self._client.put_profile_async(profile)

    async def delete(self, keys: Sequence[bytes]) -> int:
        return await self._client.delete_async(keys)
