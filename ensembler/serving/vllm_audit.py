"""Read the counts of tokens in vLLM's workers, which make them where their worker is extended by `AuditReader`.

A token is counted when logits to sample it from are computed: once for each, however its prompt was read, the one that
ends a text among them, and also where its request was aborted meanwhile. With vLLM's asynchronous scheduling that may
be one token behind the end of a text.
"""

from __future__ import annotations

from typing import Any

from ensembler.serving.token_counts import PointCount
from ensembler.serving.vllm_weights import slots_of


class AuditReader:
    """Extend vLLM's worker by a method that reads the counts (`worker_extension_cls`)."""

    vllm_config: Any

    def read_audit(self) -> list[PointCount]:
        """Return the counts of each point that was asked for.

        On ranks that gather no logits the counts are 0; the first rank's are whole.
        """
        counts = slots_of(self.vllm_config).counts
        return [] if counts is None else counts.read()
