//! What the kernel's back ends have in common: a node below `/dev`, opened once for each, and what it says
//! where it cannot be had.

use std::io;

use super::VhostError;
use crate::shortage;
use crate::virtio::spec::feature;

/// A kernel's back end, by its node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    /// Its path, as the `vhost` crate opens it.
    pub(crate) path: &'static str,
    /// The module that makes it.
    pub(crate) module: &'static str,
}

/// `/dev/vhost-net`
pub(crate) const NET: Node = Node {
    path: "/dev/vhost-net",
    module: "vhost_net",
};

/// `/dev/vhost-vsock`
pub(crate) const VSOCK: Node = Node {
    path: "/dev/vhost-vsock",
    module: "vhost_vsock",
};

/// The kernel's vhost cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// cannot open {path}: {source}; {remedy}
    #[error("cannot open {path}: {source}; {remedy}")]
    Open {
        /// The node.
        path: &'static str,
        /// Why.
        source: io::Error,
        /// What to do.
        remedy: String,
    },
    /// {path}: {source}
    #[error("{path}: {source}")]
    Refused {
        /// The node.
        path: &'static str,
        /// What it refused.
        source: VhostError,
    },
    /// {0} does not know virtio 1 (VIRTIO_F_VERSION_1): the host's kernel is older than Linux 4.0
    #[error(
        "{0} does not know virtio 1 (VIRTIO_F_VERSION_1): the host's kernel is older than Linux 4.0"
    )]
    Legacy(&'static str),
}

impl Node {
    /// For `map_err`: it could not be opened.
    pub(crate) fn not_opened(self, error: vhost::Error) -> KernelError {
        let Self { path, module } = self;
        let source = match error {
            vhost::Error::VhostOpen(source) => source,
            other => io::Error::other(other),
        };
        let remedy = match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                format!("the host's kernel has not loaded its module: `modprobe {module}`")
            }
            Some(libc::EACCES | libc::EPERM) => format!(
                "this user has to be able to read and write it: where it is the group kvm's, join that, else \
                 `chmod 666 {path}`"
            ),
            _ => shortage::remedy_of_descriptors(&source, "").map_or_else(
                || format!("it has to be the node of the kernel's module {module}"),
                str::to_owned,
            ),
        };
        KernelError::Open {
            path,
            source,
            remedy,
        }
    }

    /// For `map_err`: step `what` failed.
    pub(crate) fn refused(self, what: &'static str) -> impl FnOnce(vhost::Error) -> KernelError {
        move |source| KernelError::Refused {
            path: self.path,
            source: VhostError { what, source },
        }
    }

    /// Of the features that it says it has, those that are the rings', where it knows virtio 1.
    pub(crate) fn ring_features(self, features: u64) -> Result<u64, KernelError> {
        if features & feature::VERSION_1 == 0 {
            return Err(KernelError::Legacy(self.path));
        }
        Ok(features & (feature::EVENT_IDX | feature::INDIRECT_DESC))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_cannot_be_opened_is_named_with_what_helps() {
        let of = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            NET.not_opened(vhost::Error::VhostOpen(source)).to_string()
        };
        assert_eq!(
            of(libc::ENOENT),
            "cannot open /dev/vhost-net: No such file or directory (os error 2); the host's kernel has not \
             loaded its module: `modprobe vhost_net`"
        );
        assert!(of(libc::ENODEV).ends_with("`modprobe vhost_net`"));
        assert!(of(libc::EACCES).contains("the group kvm's"));
        assert!(of(libc::EMFILE).contains("ulimit -n"));
    }

    #[test]
    fn a_kernel_without_virtio_1_is_refused_and_of_the_others_the_rings_features_count() {
        let all = u64::MAX;
        let known = NET.ring_features(all).unwrap();
        assert_eq!(known, feature::EVENT_IDX | feature::INDIRECT_DESC);
        let old = NET.ring_features(all & !feature::VERSION_1).unwrap_err();
        assert!(old.to_string().contains("older than Linux 4.0"), "{old}");
    }
}
