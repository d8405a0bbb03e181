//! What a disk that was stopped left, as a disk that is started takes it.

use crate::virtio::life::DiskState;

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
