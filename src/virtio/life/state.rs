//! What each kind of device keeps between two runs, as plain structures.

use serde::{Deserialize, Serialize};

/// What a device holds between two runs that is neither in its queues nor in its registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// Nothing: the device has not run since the driver reset it, or it is of a kind that keeps nothing.
    #[default]
    None,
    /// A network card's.
    Net(NetState),
    /// A console's.
    Console(ConsoleState),
    /// A disk's.
    Disk(DiskState),
    /// A socket device's whose connections are this process's.
    Vsock(VsockState),
    /// A balloon's.
    Balloon(BalloonState),
}

/// What a socket device keeps between two runs. Its connections are the host's, and stay with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The device that has the driver's connections: no two have the same number.
    pub session: u64,
    /// The driver has not heard yet that the connections that it had are gone.
    pub reset_is_due: bool,
}

/// What a balloon keeps between two runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages of 4 KiB that it has, as the driver has said.
    pub actual: u32,
}

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

/// What a card keeps between two runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Pairs of queues in use, from 1 on.
    pub pairs: u16,
    /// What the driver takes unfinished: feature bits, `VIRTIO_NET_F_GUEST_*`.
    pub offloads: u64,
    /// What has been taken from the tap and waits for the guest's buffers: one packet for each pair at
    /// most.
    pub waiting: Vec<WaitingPacket>,
}

/// A packet that waits for buffers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingPacket {
    /// Of which pair's receive queue.
    pub pair: u16,
    /// The packet behind its `struct virtio_net_hdr`.
    pub bytes: Vec<u8>,
}

/// What a console keeps between two runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// What has been typed and waits for the guest's buffers; 256 bytes at most.
    pub input: Vec<u8>,
    /// Bytes that are out already of the next chain of the transmit queue.
    pub printed: usize,
}
