//! What a disk keeps between two runs.

use serde::{Deserialize, Serialize};

/// What a disk keeps between two runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// Writes may stay in a cache until the driver flushes: the `writeback` field of the configuration.
    pub writeback: bool,
    /// Requests that were taken from a queue and are not completed. The next start does each from its
    /// beginning.
    pub left: Vec<LeftRequest>,
}

/// A request that was taken from a queue and is not completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftRequest {
    /// The queue's number.
    pub queue: u16,
    /// The first descriptor of its chain.
    pub head: u16,
}

impl DiskState {
    /// Whether a disk of `queues` queues of `size` descriptors at most could have left it.
    pub(super) fn fits(&self, queues: u16, size: u16) -> bool {
        let mut counts = vec![0_usize; queues.into()];
        self.left.iter().all(|left| {
            let Some(count) = counts.get_mut(usize::from(left.queue)) else {
                return false;
            };
            *count += 1;
            left.head < size && *count <= size.into()
        })
    }

    /// The requests of queue `queue`, by their first descriptors.
    pub(super) fn of_queue(&self, queue: u16) -> Vec<u16> {
        let of_queue = self.left.iter().filter(|left| left.queue == queue);
        of_queue.map(|left| left.head).collect()
    }
}
