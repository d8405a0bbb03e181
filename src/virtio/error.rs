//! What ends a device's service, and what it does not start with.

use std::io;

use super::vhost::VhostError;

/// The driver broke the queue's rules, or the host does not serve it any more. The device needs a reset;
/// there is no other way on.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// ring: {0}
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// chain {head}: {what}
    #[error("chain {head}: {what}")]
    Chain {
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        what: &'static str,
    },
    /// the host: {call}: {source}
    #[error("the host: {call}: {source}")]
    Host {
        /// The system call.
        call: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// queue {index}: its back end cannot go on with it: the driver broke the ring's rules, or a request's
    #[error(
        "queue {index}: its back end cannot go on with it: the driver broke the ring's rules, or a request's"
    )]
    BackEnd {
        /// The queue's number.
        index: u16,
    },
    /// The back end did not take a change.
    #[error(transparent)]
    Vhost(#[from] VhostError),
}

/// Why a device did not start, though its driver is ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// queue {index}: {source}
    #[error("queue {index}: {source}")]
    Queue {
        /// The queue's number.
        index: u16,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// The back end refused a step.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// The host refused something that the device needs to run.
    #[error("{0}")]
    Host(#[from] io::Error),
}
