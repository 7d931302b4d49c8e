# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Moving pages between device memory and a store: threads, deadlines, queues, breaker."""

from ascend_direct.transfer.courier import Ticket
from ascend_direct.transfer.engine import LoadOutcome, TransferEngine, TransferLimits
from ascend_direct.transfer.store_queue import StoreJob

__all__ = ["LoadOutcome", "StoreJob", "Ticket", "TransferEngine", "TransferLimits"]
