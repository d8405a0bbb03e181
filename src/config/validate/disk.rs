//! What a disk must be.

use super::{InvalidVirtio, back_ends_socket, bucket, queue_size};
use crate::config::limits::{DISK_QUEUE_SIZES, MAX_QUEUES, SERIAL_SIZE};
use crate::config::{DiskConfig, ImageType, QueueAffinity};

impl DiskConfig {
    /// Whether there can be such a disk.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return Err(InvalidVirtio::Queues(self.num_queues));
        }
        self.check_back_end()?;
        let mut placed = Vec::new();
        for QueueAffinity { queue_index, .. } in &self.queue_affinity {
            let (queue, queues) = (*queue_index, self.num_queues);
            if queue >= queues {
                return Err(InvalidVirtio::AffinityQueue { queue, queues });
            }
            if placed.contains(&queue) {
                return Err(InvalidVirtio::AffinityTwice(queue));
            }
            placed.push(queue);
        }
        let is_serial = |serial: &&String| {
            serial.len() <= SERIAL_SIZE
                && serial
                    .bytes()
                    .all(|byte| byte == b' ' || byte.is_ascii_graphic())
        };
        if let Some(serial) = self.serial.as_ref().filter(|serial| !is_serial(serial)) {
            return Err(InvalidVirtio::Serial(serial.clone()));
        }
        if self.backing_files && self.image_type != ImageType::Qcow2 {
            return Err(InvalidVirtio::BackingFiles);
        }
        bucket(
            "bw",
            self.bw_size,
            self.bw_one_time_burst,
            self.bw_refill_time,
        )?;
        bucket(
            "ops",
            self.ops_size,
            self.ops_one_time_burst,
            self.ops_refill_time,
        )?;
        queue_size(self.queue_size, DISK_QUEUE_SIZES)
    }

    /// Whether the disk is Busway's own or another process's, and nothing is asked of one that is the other's to do.
    fn check_back_end(&self) -> Result<(), InvalidVirtio> {
        if back_ends_socket(self.vhost_user, self.socket.as_deref())?.is_none() {
            return Ok(());
        }
        let limited = self.rate_limiter().is_some();
        for (key, said) in [
            ("path", !self.path.as_os_str().is_empty()),
            ("fd", self.fd.is_some()),
            ("image_type", self.image_type != ImageType::Raw),
            ("backing_files", self.backing_files),
            ("readonly", self.readonly),
            ("direct", self.direct),
            ("writeback", !self.writeback),
            ("queue_affinity", !self.queue_affinity.is_empty()),
            ("serial", self.serial.is_some()),
            ("bw_size and ops_size", limited),
        ] {
            if said {
                return Err(InvalidVirtio::BackEndsChoice(key));
            }
        }
        Ok(())
    }
}
