//! The bodies that add a virtio device, by Cloud Hypervisor's words (its OpenAPI description, `DiskConfig`,
//! `NetConfig` and `FsConfig`). What would change what the device is, and Busway cannot do, is refused; words that it
//! does not know are ignored, as clients expect.

use std::path::PathBuf;

use busway_host::Mac;
use serde::Deserialize;

use super::lacking::{Asked, Fault, Lack};
use super::some_text;
use crate::config::{
    Choice, DiskConfig, FsConfig, ImageType, NetConfig, PciPlace, QueueAffinity, VhostMode,
    VirtioConfig, VsockConfig,
};
use crate::machine::Files;

/// What all virtio devices can be asked to be.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Common {
    #[serde(default)]
    iommu: Asked,
    pci_segment: Option<u16>,
    pci_device_id: Option<u8>,
    num_queues: Option<u16>,
    queue_size: Option<u16>,
    pub(super) id: Option<String>,
}

impl Common {
    pub(super) fn check(&self) -> Result<(), Fault> {
        Lack::VirtualIommu.unless_asked(self.iommu)
    }

    /// Where in the guest it is to be. Whether there is such a place is the configuration's to say.
    pub(super) fn place(&self) -> PciPlace {
        PciPlace {
            segment: self.pci_segment.unwrap_or(0),
            device: self.pci_device_id,
        }
    }

    /// Puts what was said in the place of defaults.
    fn apply(self, id: &mut Option<String>, num_queues: &mut u16, queue_size: &mut u16) {
        *id = some_text(self.id);
        *num_queues = self.num_queues.unwrap_or(*num_queues);
        *queue_size = self.queue_size.unwrap_or(*queue_size);
    }
}

/// A disk to be added.
#[derive(Debug, Deserialize)]
pub(super) struct AddDisk {
    path: Option<String>,
    /// Beside Cloud Hypervisor's, in vm.create: which of the descriptors that came it is.
    pub(super) fd_index: Option<usize>,
    vhost_user: Option<bool>,
    vhost_socket: Option<String>,
    readonly: Option<bool>,
    direct: Option<bool>,
    serial: Option<String>,
    image_type: Option<String>,
    backing_files: Option<bool>,
    queue_affinity: Option<Vec<QueueAffinity>>,
    rate_limiter_config: Option<RateLimiter>,
    #[serde(default)]
    rate_limit_group: Asked,
    #[serde(flatten)]
    common: Common,
}

#[derive(Debug, Default, Deserialize)]
struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

#[derive(Debug, Deserialize)]
struct TokenBucket {
    size: u64,
    one_time_burst: Option<u64>,
    refill_time: u64,
}

impl AddDisk {
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, Fault> {
        self.common.check()?;
        Lack::SharedLimit.unless_asked(self.rate_limit_group)?;
        let vhost_user = self.vhost_user.unwrap_or(false);
        let path = match (files.all().len(), some_text(self.path)) {
            (0, None) if vhost_user => PathBuf::new(),
            (0, path) => path
                .ok_or("path is missing: an image, or a block device")?
                .into(),
            (1, None) => files.described(),
            (1, Some(_)) => {
                return Err(Fault::from(
                    "both path and a descriptor say which disk: leave one out",
                ));
            }
            (count, _) => {
                return Err(Fault::Wrong(format!(
                    "{count} descriptors were sent for a disk, which has one"
                )));
            }
        };
        let mut disk = DiskConfig::new(path);
        disk.vhost_user = vhost_user;
        disk.socket = some_text(self.vhost_socket).map(PathBuf::from);
        // What is in an image says nothing of what it is: the guest may have written it.
        disk.image_type = match self.image_type.as_deref() {
            None | Some("Raw" | "Unknown") => ImageType::Raw,
            Some("Qcow2") => ImageType::Qcow2,
            Some("FixedVhd" | "Vhdx") => return Err(Fault::Lacks(Lack::ImageType)),
            Some(other) => {
                return Err(Fault::Wrong(format!(
                    "image_type: there is no type {other}"
                )));
            }
        };
        disk.backing_files = self.backing_files.unwrap_or(false);
        disk.readonly = self.readonly.unwrap_or(false);
        disk.direct = self.direct.unwrap_or(false);
        disk.serial = some_text(self.serial);
        disk.queue_affinity = self.queue_affinity.unwrap_or_default();
        let limits = self.rate_limiter_config.unwrap_or_default();
        if let Some(bucket) = limits.bandwidth {
            disk.bw_size = Some(bucket.size);
            disk.bw_one_time_burst = bucket.one_time_burst;
            disk.bw_refill_time = Some(bucket.refill_time);
        }
        if let Some(bucket) = limits.ops {
            disk.ops_size = Some(bucket.size);
            disk.ops_one_time_burst = bucket.one_time_burst;
            disk.ops_refill_time = Some(bucket.refill_time);
        }
        let place = self.common.place();
        (disk.pci_segment, disk.pci_device_id) = (place.segment, place.device);
        let sizes = (&mut disk.num_queues, &mut disk.queue_size);
        self.common.apply(&mut disk.id, sizes.0, sizes.1);
        Ok(VirtioConfig::Disk(disk))
    }
}

/// A NIC to be added. The tap keeps the address that it has: `ip` and `mask` are others' to give.
#[derive(Debug, Deserialize)]
pub(super) struct AddNet {
    tap: Option<String>,
    mac: Option<String>,
    #[serde(default)]
    host_mac: Asked,
    mtu: Option<u16>,
    #[serde(default)]
    rate_limiter_config: Asked,
    offload_tso: Option<bool>,
    offload_ufo: Option<bool>,
    offload_csum: Option<bool>,
    fds: Option<Vec<i32>>,
    vhost_user: Option<bool>,
    vhost_socket: Option<String>,
    vhost_mode: Option<String>,
    /// Beside Cloud Hypervisor's: the host's kernel serves it, or must not.
    vhost: Option<bool>,
    /// Beside Cloud Hypervisor's: what the guest sends from another address is dropped.
    spoofchk: Option<bool>,
    /// Beside Cloud Hypervisor's, in vm.create: which of the descriptors that came are the tap's.
    pub(super) fd_indexes: Option<Vec<usize>>,
    #[serde(flatten)]
    common: Common,
}

impl AddNet {
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, Fault> {
        self.common.check()?;
        let vhost_user = self.vhost_user.unwrap_or(false);
        let tap = some_text(self.tap);
        Lack::TapAddress.unless_asked(self.host_mac)?;
        Lack::TapLimit.unless_asked(self.rate_limiter_config)?;
        let offloads = [self.offload_tso, self.offload_ufo, self.offload_csum];
        Lack::OffloadChoice.unless_asked(offloads.contains(&Some(false)))?;
        // By number they are the client's own; those that count come beside the request.
        if files.is_empty() && self.fds.is_some_and(|fds| !fds.is_empty()) {
            return Err(Fault::from(
                "fds are numbers of nobody's: send a tap's descriptors beside the request \
                 (SCM_RIGHTS), or name the tap, with tap",
            ));
        }
        if !files.is_empty() && tap.is_some() {
            return Err(Fault::from(
                "both tap and descriptors say which tap: leave one out",
            ));
        }
        if !files.is_empty() && vhost_user {
            return Err(Fault::from(
                "descriptors were sent for a NIC of another process's, which has a socket: leave them out",
            ));
        }
        let mac = self.mac.as_deref().map(str::parse::<Mac>).transpose();
        let mut net = NetConfig {
            tap,
            vhost_user,
            socket: some_text(self.vhost_socket).map(PathBuf::from),
            vhost_mode: vhost_mode(self.vhost_mode.as_deref())?,
            mtu: self.mtu,
            spoofchk: self.spoofchk.unwrap_or(false),
            mac: mac.map_err(|error| format!("mac: {error}"))?,
            vhost: match self.vhost {
                None => Choice::Auto,
                Some(true) => Choice::On,
                Some(false) => Choice::Off,
            },
            ..NetConfig::default()
        };
        let place = self.common.place();
        (net.pci_segment, net.pci_device_id) = (place.segment, place.device);
        let sizes = (&mut net.num_queues, &mut net.queue_size);
        self.common.apply(&mut net.id, sizes.0, sizes.1);
        Ok(VirtioConfig::Net(net))
    }
}

/// Which end of a NIC's socket Busway is. Cloud Hypervisor, `VhostMode`
fn vhost_mode(word: Option<&str>) -> Result<VhostMode, Fault> {
    match word {
        None | Some("Client") => Ok(VhostMode::Client),
        Some("Server") => Ok(VhostMode::Server),
        Some(other) => Err(Fault::Wrong(format!(
            "vhost_mode: {other} is neither Client nor Server"
        ))),
    }
}

/// A shared folder to be added.
#[derive(Debug, Deserialize)]
pub(super) struct AddFs {
    tag: Option<String>,
    socket: Option<String>,
    #[serde(flatten)]
    common: Common,
}

/// A vsock device to be added. Without a socket it is the host's, which Cloud Hypervisor has not.
#[derive(Debug, Deserialize)]
pub(super) struct AddVsock {
    cid: u32,
    socket: Option<String>,
    #[serde(flatten)]
    common: Common,
}

impl AddFs {
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, Fault> {
        self.common.check()?;
        if !files.is_empty() {
            return Err(Fault::from(
                "a descriptor was sent for a shared folder, which has a socket: leave it out",
            ));
        }
        let tag = some_text(self.tag).ok_or("tag is missing: what the guest mounts it by")?;
        let socket = some_text(self.socket).ok_or("socket is missing: where virtiofsd listens")?;
        let mut fs = FsConfig::new(tag, socket);
        let place = self.common.place();
        (fs.pci_segment, fs.pci_device_id) = (place.segment, place.device);
        let sizes = (&mut fs.num_queues, &mut fs.queue_size);
        self.common.apply(&mut fs.id, sizes.0, sizes.1);
        Ok(VirtioConfig::Fs(fs))
    }
}

impl AddVsock {
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, Fault> {
        self.common.check()?;
        if !files.is_empty() {
            return Err(Fault::from("a vsock device takes no descriptors"));
        }
        let place = self.common.place();
        Ok(VirtioConfig::Vsock(VsockConfig {
            cid: self.cid,
            socket: some_text(self.socket).map(Into::into),
            id: some_text(self.common.id),
            pci_segment: place.segment,
            pci_device_id: place.device,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::json::parse;

    fn disk(body: &str) -> Result<VirtioConfig, Fault> {
        let disk = parse::<AddDisk>(body.as_bytes())?;
        disk.into_config(&Files::default())
    }

    fn net(body: &str) -> Result<VirtioConfig, Fault> {
        let net = parse::<AddNet>(body.as_bytes())?;
        net.into_config(&Files::default())
    }

    #[test]
    fn a_disk_as_known_clients_write_it() {
        // With every default, unset values as null, and words that say nothing here.
        let all = r#"{"id":"data","pci_segment":1,"pci_device_id":null,"path":"/a.raw","readonly":true,
            "direct":false,"num_queues":2,"queue_size":1024,"vhost_user":false,"vhost_socket":null,
            "rate_limit_group":null,"rate_limiter_config":null,"disable_io_uring":false,
            "disable_aio":false,"serial":null,"queue_affinity":null,"backing_files":false,"sparse":true,
            "image_type":"Unknown","lock_granularity":"ByteRange","iommu":false}"#;
        let expected = DiskConfig {
            readonly: true,
            num_queues: 2,
            queue_size: 1024,
            id: Some("data".into()),
            pci_segment: 1,
            ..DiskConfig::new("/a.raw")
        };
        assert_eq!(disk(all), Ok(VirtioConfig::Disk(expected)));
        let least = VirtioConfig::Disk(DiskConfig::new("/a.raw"));
        assert_eq!(disk(r#"{"path":"/a.raw"}"#), Ok(least.clone()));
        assert_eq!(disk(r#"{"path":"/a.raw","id":""}"#), Ok(least));
    }

    #[test]
    fn a_place_in_the_guest_is_kept() {
        let place = |body| disk(body).map(|disk| disk.place());
        let of = |segment, device| Ok(PciPlace { segment, device });
        let body = r#"{"path":"a","pci_segment":1,"pci_device_id":7}"#;
        assert_eq!(place(body), of(1, Some(7)));
        let null = r#"{"path":"a","pci_segment":null,"pci_device_id":null}"#;
        assert_eq!(place(null), of(0, None));
    }

    #[test]
    fn a_disk_with_all_that_can_be_asked_of_it() {
        let all = r#"{"path":"/a.qcow2","image_type":"Qcow2","backing_files":true,"serial":"S1",
            "queue_affinity":[{"queue_index":0,"host_cpus":[1,4]}],
            "rate_limiter_config":{"bandwidth":{"size":1000,"one_time_burst":0,"refill_time":100},
            "ops":{"size":10,"refill_time":50}}}"#;
        let expected = DiskConfig {
            image_type: ImageType::Qcow2,
            backing_files: true,
            serial: Some("S1".into()),
            queue_affinity: vec![QueueAffinity {
                queue_index: 0,
                host_cpus: vec![1, 4],
            }],
            bw_size: Some(1000),
            bw_one_time_burst: Some(0),
            bw_refill_time: Some(100),
            ops_size: Some(10),
            ops_refill_time: Some(50),
            ..DiskConfig::new("/a.qcow2")
        };
        assert_eq!(disk(all), Ok(VirtioConfig::Disk(expected)));
    }

    #[test]
    fn a_nic_as_known_clients_write_it() {
        let all = r#"{"id":null,"pci_segment":0,"pci_device_id":null,"tap":"vmtap1","ip":"192.168.249.1",
            "mask":"255.255.255.0","mac":"52:54:00:be:ef:12","host_mac":null,"mtu":null,"num_queues":2,
            "queue_size":256,"vhost_user":false,"vhost_socket":null,"vhost_mode":"Client","fds":null,
            "rate_limiter_config":null,"offload_tso":true,"offload_ufo":true,"offload_csum":true}"#;
        let expected = NetConfig {
            tap: Some("vmtap1".into()),
            mac: Some("52:54:00:be:ef:12".parse().unwrap()),
            ..NetConfig::default()
        };
        assert_eq!(net(all), Ok(VirtioConfig::Net(expected)));
        assert_eq!(net("{}"), Ok(VirtioConfig::Net(NetConfig::default())));
        let limited = NetConfig {
            mtu: Some(9000),
            spoofchk: true,
            ..NetConfig::default()
        };
        let limited = Ok(VirtioConfig::Net(limited));
        assert_eq!(net(r#"{"mtu":9000,"spoofchk":true}"#), limited);
    }

    fn fs(body: &str) -> Result<VirtioConfig, Fault> {
        parse::<AddFs>(body.as_bytes())?.into_config(&Files::default())
    }

    #[test]
    fn a_shared_folder_as_known_clients_write_it() {
        let kata = r#"{"num_queues":1,"pci_segment":1,"queue_size":1024,"socket":"/run/virtiofsd.sock",
            "tag":"kataShared"}"#;
        let expected = FsConfig {
            pci_segment: 1,
            ..FsConfig::new("kataShared", "/run/virtiofsd.sock")
        };
        assert_eq!(fs(kata), Ok(VirtioConfig::Fs(expected)));
        let ch_remote =
            r#"{"tag":"share0","socket":"/run/fs","num_queues":2,"queue_size":512,"id":"f"}"#;
        let expected = FsConfig {
            num_queues: 2,
            queue_size: 512,
            id: Some("f".into()),
            ..FsConfig::new("share0", "/run/fs")
        };
        assert_eq!(fs(ch_remote), Ok(VirtioConfig::Fs(expected)));
        for (body, word) in [
            ("{}", "tag"),
            (r#"{"tag":"","socket":"/s"}"#, "tag"),
            (r#"{"tag":"t"}"#, "socket"),
            (r#"{"tag":"t","socket":"/s","iommu":true}"#, "virtual IOMMU"),
            (r#"{"tag":"t","socket":"/s","pci_segment":65536}"#, "65536"),
        ] {
            let why = fs(body).unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
    }

    #[test]
    fn a_disk_of_another_processs_has_a_socket_in_the_place_of_a_path() {
        let expected = DiskConfig {
            vhost_user: true,
            socket: Some("/run/blk".into()),
            num_queues: 2,
            ..DiskConfig::new("")
        };
        let body = r#"{"vhost_user":true,"vhost_socket":"/run/blk","num_queues":2,"path":null,
            "readonly":false,"direct":false,"image_type":"Unknown"}"#;
        assert_eq!(disk(body), Ok(VirtioConfig::Disk(expected)));
        for (body, word) in [
            (r#"{"vhost_user":true}"#, "socket"),
            (r#"{"path":"a","vhost_socket":"/run/s"}"#, "vhost_user=on"),
            (
                r#"{"path":"a","vhost_user":true,"vhost_socket":"/s"}"#,
                "path is",
            ),
            (
                r#"{"vhost_user":true,"vhost_socket":"/s","readonly":true}"#,
                "readonly is",
            ),
        ] {
            let why = disk(body).unwrap().check().unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
    }

    #[test]
    fn a_nic_of_another_processs_has_a_socket_and_an_end_of_it() {
        let body = r#"{"vhost_user":true,"vhost_socket":"/run/net","vhost_mode":"Server","num_queues":4,
            "mtu":9000,"tap":null,"ip":"192.168.249.1","mask":"255.255.255.0"}"#;
        let expected = NetConfig {
            vhost_user: true,
            socket: Some("/run/net".into()),
            vhost_mode: VhostMode::Server,
            mtu: Some(9000),
            num_queues: 4,
            ..NetConfig::default()
        };
        assert_eq!(net(body), Ok(VirtioConfig::Net(expected)));
        for (body, word) in [
            (r#"{"vhost_user":true}"#, "socket=PATH"),
            (r#"{"vhost_socket":"/s"}"#, "vhost_user=on"),
            (r#"{"vhost_mode":"Server"}"#, "vhost_mode=server"),
            (
                r#"{"vhost_user":true,"vhost_socket":"/s","tap":"t"}"#,
                "tap is",
            ),
        ] {
            let why = net(body).unwrap().check().unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
    }

    #[test]
    fn what_would_be_another_device_than_was_asked_for_is_refused() {
        for (body, word) in [
            ("{}", "path"),
            (r#"{"path":"a","iommu":true}"#, "virtual IOMMU"),
            (r#"{"path":"a","image_type":"Vhdx"}"#, "another type"),
            (r#"{"path":"a","image_type":"Nonsense"}"#, "Nonsense"),
            (r#"{"path":"a","pci_device_id":256}"#, "256"),
            (r#"{"path":"a","rate_limit_group":"g"}"#, "share"),
            (r#"{"path":7}"#, "expected"),
            ("", "body"),
        ] {
            let why = disk(body).unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
        let files = Files::from(vec![std::io::pipe().unwrap().0.into()]);
        let with_files = |body: &str| {
            let net = parse::<AddNet>(body.as_bytes())?;
            net.into_config(&files)
        };
        assert!(with_files(r#"{"tap":"vmtap0"}"#).is_err());
        assert!(with_files(r#"{"vhost_user":true,"vhost_socket":"/s"}"#).is_err());
        // The numbers of the client's own say nothing beside those that came.
        let net_config = VirtioConfig::Net(NetConfig::default());
        assert_eq!(with_files(r#"{"fds":[27]}"#), Ok(net_config.clone()));
        assert_eq!(with_files(r#"{"tap":""}"#), Ok(net_config), "none is said");
        for (body, word) in [
            (r#"{"fds":[0,1,2]}"#, "SCM_RIGHTS"),
            (r#"{"mac":"nonsense"}"#, "nonsense"),
            (r#"{"vhost_mode":"Peer"}"#, "Peer"),
            (r#"{"host_mac":"52:54:00:12:34:56"}"#, "host_mac"),
            (r#"{"rate_limiter_config":{"ops":{"size":1}}}"#, "limited"),
            (r#"{"offload_tso":false}"#, "offload"),
        ] {
            let why = net(body).unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
    }
}
