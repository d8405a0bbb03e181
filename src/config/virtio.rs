//! A virtio device that can come and leave, of whatever kind.

use std::path::Path;

use busway_host::Mac;

use super::validate::is_id;
use super::{
    DiskConfig, FsConfig, GenericConfig, InvalidVirtio, NetConfig, PmemConfig, VmConfig,
    VsockConfig,
};

/// A virtio device: what a kind of device adds to join those that come and leave is a variant here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VirtioConfig {
    /// A disk.
    Disk(DiskConfig),
    /// A NIC.
    Net(NetConfig),
    /// A shared folder.
    Fs(FsConfig),
    /// Persistent memory.
    Pmem(PmemConfig),
    /// A device of any kind that another process serves.
    Generic(GenericConfig),
    /// Sockets, of which a VM has one device at most.
    Vsock(VsockConfig),
}

impl VirtioConfig {
    /// What devices of its kind are called, before a number.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Disk(_) => "disk",
            Self::Net(_) => "net",
            Self::Fs(_) => "fs",
            Self::Pmem(_) => "pmem",
            Self::Generic(_) => "vhost-user",
            Self::Vsock(_) => "vsock",
        }
    }

    /// The name that it was given.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Disk(disk) => disk.id.as_deref(),
            Self::Net(net) => net.id.as_deref(),
            Self::Fs(fs) => fs.id.as_deref(),
            Self::Pmem(pmem) => pmem.id.as_deref(),
            Self::Generic(generic) => generic.id.as_deref(),
            Self::Vsock(vsock) => vsock.id.as_deref(),
        }
    }

    /// The same, called `name`.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        match &mut self {
            Self::Disk(disk) => disk.id = Some(name.to_owned()),
            Self::Net(net) => net.id = Some(name.to_owned()),
            Self::Fs(fs) => fs.id = Some(name.to_owned()),
            Self::Pmem(pmem) => pmem.id = Some(name.to_owned()),
            Self::Generic(generic) => generic.id = Some(name.to_owned()),
            Self::Vsock(vsock) => vsock.id = Some(name.to_owned()),
        }
        self
    }

    /// The Ethernet address that it was given, which no two devices of a VM have.
    #[must_use]
    pub const fn mac(&self) -> Option<Mac> {
        match self {
            Self::Net(net) => net.mac,
            _ => None,
        }
    }

    /// The Unix socket of the process that serves it, where that is another one, which maps the guest's RAM.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Disk(disk) => disk.back_end(),
            Self::Net(net) => net.back_end(),
            Self::Vsock(_) | Self::Pmem(_) => None,
            Self::Fs(fs) => Some(&fs.socket),
            Self::Generic(generic) => Some(&generic.socket),
        }
    }

    /// What messages call it that are about it as `name`.
    #[must_use]
    pub fn described(&self, name: &str) -> String {
        format!("{} {name}", self.word())
    }

    /// Whether there can be such a device, as far as it can be told without looking at the host.
    ///
    /// # Errors
    /// [`InvalidVirtio`]
    pub fn check(&self) -> Result<(), InvalidVirtio> {
        if let Some(id) = self.id().filter(|id| !is_id(id)) {
            return Err(InvalidVirtio::Id(id.to_owned()));
        }
        match self {
            Self::Disk(disk) => disk.check(),
            Self::Net(net) => net.check(),
            Self::Fs(fs) => fs.check(),
            Self::Pmem(pmem) => pmem.check(),
            Self::Generic(generic) => generic.check(),
            Self::Vsock(vsock) => vsock.check(),
        }
    }
}

impl VmConfig {
    /// The devices that a VM starts with and that can leave it, in the order of their slots, each with its
    /// number among those of its kind.
    pub fn virtio(&self) -> impl Iterator<Item = (usize, VirtioConfig)> {
        let disks = self.disk.iter().cloned().map(VirtioConfig::Disk);
        let nets = self.net.iter().cloned().map(VirtioConfig::Net);
        let folders = self.fs.iter().cloned().map(VirtioConfig::Fs);
        let pmems = self.pmem.iter().cloned().map(VirtioConfig::Pmem);
        let generic = self.generic.iter().cloned().map(VirtioConfig::Generic);
        let vsocks = self.vsock.iter().cloned().map(VirtioConfig::Vsock);
        let devices = disks.enumerate().chain(nets.enumerate());
        let devices = devices.chain(folders.enumerate());
        let devices = devices.chain(pmems.enumerate());
        let devices = devices.chain(generic.enumerate());
        devices.chain(vsocks.enumerate())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_shared_where_a_device_of_another_processs_is_there_from_the_start() {
        let mut config = VmConfig {
            disk: vec![DiskConfig::new("a.raw")],
            ..VmConfig::default()
        };
        assert!(!config.shares_memory());
        config.fs.push(FsConfig::new("t", "/s"));
        assert!(config.shares_memory());
        config.fs.clear();
        config.disk.push(DiskConfig {
            vhost_user: true,
            socket: Some("/s".into()),
            ..DiskConfig::new("")
        });
        assert!(config.shares_memory());
        config.disk.clear();
        config.net.push(NetConfig {
            vhost_user: true,
            socket: Some("/s".into()),
            ..NetConfig::default()
        });
        assert!(config.shares_memory());
        config.net = vec![NetConfig::default()];
        assert!(!config.shares_memory());
        config.memory.shared = true;
        assert!(config.shares_memory());
    }

    #[test]
    fn a_device_that_comes_later_is_held_to_the_same_rules() {
        let disk = |id: &str| {
            VirtioConfig::Disk(DiskConfig {
                id: Some(id.to_owned()),
                ..DiskConfig::new("a.raw")
            })
        };
        assert_eq!(disk("data").check(), Ok(()));
        for id in ["", "a b", "a/b", "a,b", "é"] {
            assert_eq!(disk(id).check(), Err(InvalidVirtio::Id(id.to_owned())));
        }
        let net = VirtioConfig::Net(NetConfig {
            num_queues: 3,
            ..NetConfig::default()
        });
        assert_eq!(net.check(), Err(InvalidVirtio::Pairs(3)));
    }
}
