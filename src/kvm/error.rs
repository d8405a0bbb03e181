//! What can go wrong with KVM, in words a person can act on.

use std::fmt;
use std::io;

/// KVM cannot do what the VM needs.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm cannot be opened: {reason}; {remedy}
    #[error("/dev/kvm cannot be opened: {reason}; {remedy}")]
    Unavailable {
        /// Why.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// this host's KVM lacks {0}; run a Linux kernel of version 5.10 or newer
    #[error("this host's KVM lacks {0}; run a Linux kernel of version 5.10 or newer")]
    MissingCapability(&'static str),
    /// KVM speaks API version {0}, and only version 12 is known
    #[error("KVM speaks API version {0}, and only version 12 is known")]
    ApiVersion(i32),
    /// {asked} vCPUs are more than the {limit} that this host's KVM allows one VM; ask for fewer
    /// with --cpus boot=
    #[error(
        "{asked} vCPUs are more than the {limit} that this host's KVM allows one VM; \
         ask for fewer with --cpus boot="
    )]
    TooManyVcpus {
        /// How many were asked for.
        asked: usize,
        /// How many there can be.
        limit: usize,
    },
    /// a vCPU would have APIC id {id}, ...
    #[error(
        "a vCPU would have APIC id {id}, but this host's KVM has ids below {limit} only; \
         ask for fewer with --cpus boot= and max=, or group them by powers of two in topology="
    )]
    ApicId {
        /// The id.
        id: u32,
        /// How many ids there are.
        limit: usize,
    },
    /// no memory slot is free: all {limit} of KVM's are in use
    #[error("no memory slot is free: all {limit} of KVM's are in use")]
    NoMemslot {
        /// How many there are.
        limit: usize,
    },
    /// {what} failed on {object}: {source}
    #[error("{what} failed on {object}: {source}")]
    Ioctl {
        /// The ioctl or system call.
        what: &'static str,
        /// What it was done to.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// vCPU {id} cannot run where --cpus affinity= says: {source}
    #[error(
        "vCPU {id} cannot run on the host's processors {cpus:?} alone, as --cpus affinity= says: {source}; \
         /sys/devices/system/cpu/online has those that there are, and this process may be kept from some (cpuset)"
    )]
    Place {
        /// Which vCPU.
        id: u8,
        /// The processors.
        cpus: Vec<usize>,
        /// Why not.
        source: io::Error,
    },
    /// the thread of vCPU {id} could not be started: {source}
    #[error("the thread of vCPU {id} could not be started: {source}")]
    Thread {
        /// Which vCPU.
        id: u8,
        /// Why.
        source: io::Error,
    },
}

impl KvmError {
    /// For `map_err` on a call of kvm-ioctls: names the call and what it was made on.
    pub(crate) fn ioctl(
        what: &'static str,
        object: impl fmt::Display,
    ) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let object = object.to_string();
        move |error| Self::Ioctl {
            what,
            object,
            source: error.into(),
        }
    }

    /// Why `/dev/kvm` did not open and what to do, `cpuinfo` being the text of `/proc/cpuinfo`.
    pub(super) fn unavailable(error: &io::Error, cpuinfo: &str) -> Self {
        let has = |flag: &str| {
            cpuinfo
                .lines()
                .filter(|line| line.starts_with("flags"))
                .any(|line| line.split_whitespace().any(|word| word == flag))
        };
        let (reason, remedy) = match error.raw_os_error() {
            // The file's mode answers EACCES, and the device cgroup EPERM, to root as well.
            Some(libc::EPERM) => (
                "the device cgroup forbids it".to_owned(),
                "let the container or unit have it (systemd: DeviceAllow=/dev/kvm rw; docker: --device /dev/kvm)"
                    .to_owned(),
            ),
            Some(libc::EACCES) => (
                "no permission".to_owned(),
                "join the group that owns it (`sudo usermod -aG kvm $USER`, then log in again)"
                    .to_owned(),
            ),
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                let module = if has("svm") {
                    Some("kvm_amd")
                } else if has("vmx") {
                    Some("kvm_intel")
                } else {
                    None
                };
                match module {
                    Some(module) => (
                        format!("the kernel module {module} is not loaded"),
                        format!("load it (`sudo modprobe {module}`)"),
                    ),
                    None => (
                        "the processor shows no virtualisation (neither vmx nor svm)".to_owned(),
                        "switch VT-x or AMD-V on in the firmware or, where this is itself a VM, \
                         nesting on its host"
                            .to_owned(),
                    ),
                }
            }
            Some(libc::EMFILE) => (
                "the process may open no more files".to_owned(),
                "raise the limit (`ulimit -n`, LimitNOFILE= in a systemd unit)".to_owned(),
            ),
            Some(libc::EBUSY) => (
                "another hypervisor holds the processor".to_owned(),
                "stop it".to_owned(),
            ),
            _ => (
                error.to_string(),
                "see the kernel's log (`dmesg | grep -i kvm`)".to_owned(),
            ),
        };
        Self::Unavailable { reason, remedy }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(errno: i32, cpuinfo: &str) -> String {
        KvmError::unavailable(&io::Error::from_raw_os_error(errno), cpuinfo).to_string()
    }

    #[test]
    fn each_way_kvm_is_missing_has_its_own_remedy() {
        assert!(text(libc::EACCES, "").contains("usermod -aG kvm"));
        assert!(text(libc::EPERM, "").contains("DeviceAllow=/dev/kvm"));
        assert!(text(libc::ENOENT, "flags\t\t: fpu svm").contains("modprobe kvm_amd"));
        assert!(text(libc::ENODEV, "flags\t\t: vmx").contains("modprobe kvm_intel"));
        assert!(text(libc::ENOENT, "flags\t\t: fpu\nvmx").contains("nesting"));
    }
}
