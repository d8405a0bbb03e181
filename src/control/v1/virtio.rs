//! The bodies that add a virtio device, by Cloud Hypervisor's words (its OpenAPI description, `DiskConfig`
//! and `NetConfig`). What would change what the device is, and Busway cannot do, is refused; words that it
//! does not know are ignored, as clients expect.

use busway_host::Mac;
use serde::Deserialize;

use crate::config::{DiskConfig, ImageType, NetConfig, QueueAffinity, VirtioConfig};
use crate::machine::Files;

/// What Busway cannot do is not to be asked for.
fn refuse(asked: bool, what: &str) -> Result<(), String> {
    match asked {
        true => Err(format!("Busway cannot do this yet: {what}")),
        false => Ok(()),
    }
}

/// What all virtio devices can be asked to be.
#[derive(Debug, Default, Deserialize)]
struct Common {
    iommu: Option<bool>,
    pci_segment: Option<u16>,
    vhost_user: Option<bool>,
    vhost_socket: Option<String>,
    num_queues: Option<u16>,
    queue_size: Option<u16>,
    id: Option<String>,
}

impl Common {
    fn check(&self) -> Result<(), String> {
        refuse(self.iommu == Some(true), "a device behind a virtual IOMMU")?;
        refuse(
            self.pci_segment.is_some_and(|segment| segment != 0),
            "another PCI segment than 0",
        )?;
        refuse(
            self.vhost_user == Some(true) || self.vhost_socket.is_some(),
            "vhost-user devices",
        )
    }

    /// Puts what was said in the place of defaults.
    fn apply(self, id: &mut Option<String>, num_queues: &mut u16, queue_size: &mut u16) {
        *id = self.id.filter(|id| !id.is_empty());
        *num_queues = self.num_queues.unwrap_or(*num_queues);
        *queue_size = self.queue_size.unwrap_or(*queue_size);
    }
}

/// A disk to be added.
#[derive(Debug, Deserialize)]
pub(super) struct AddDisk {
    path: Option<String>,
    readonly: Option<bool>,
    direct: Option<bool>,
    serial: Option<String>,
    image_type: Option<String>,
    backing_files: Option<bool>,
    queue_affinity: Option<Vec<QueueAffinity>>,
    rate_limiter_config: Option<RateLimiter>,
    rate_limit_group: Option<String>,
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
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, String> {
        self.common.check()?;
        refuse(!files.is_empty(), "a disk by its descriptor")?;
        refuse(
            self.rate_limit_group.is_some_and(|group| !group.is_empty()),
            "a limit that several disks share",
        )?;
        let path = self.path.filter(|path| !path.is_empty());
        let path = path.ok_or("path is missing: an image, or a block device")?;
        let mut disk = DiskConfig::new(path);
        // What is in an image says nothing of what it is: the guest may have written it.
        disk.image_type = match self.image_type.as_deref() {
            None | Some("Raw" | "Unknown") => ImageType::Raw,
            Some("Qcow2") => ImageType::Qcow2,
            Some(other) => {
                return Err(format!(
                    "Busway cannot do this yet: images of type {other}; there are Raw and Qcow2"
                ));
            }
        };
        disk.backing_files = self.backing_files.unwrap_or(false);
        disk.readonly = self.readonly.unwrap_or(false);
        disk.direct = self.direct.unwrap_or(false);
        disk.serial = self.serial.filter(|serial| !serial.is_empty());
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
    mtu: Option<u16>,
    fds: Option<Vec<i32>>,
    #[serde(flatten)]
    common: Common,
}

impl AddNet {
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, String> {
        self.common.check()?;
        refuse(self.mtu.is_some(), "a NIC with an MTU of its own")?;
        // By number they are the client's own; those that count come beside the request.
        if files.is_empty() && self.fds.is_some_and(|fds| !fds.is_empty()) {
            return Err(
                "fds are numbers of nobody's: send a tap's descriptors beside the request \
                        (SCM_RIGHTS), or name the tap, with tap"
                    .to_owned(),
            );
        }
        if !files.is_empty() && self.tap.is_some() {
            return Err("both tap and descriptors say which tap: leave one out".to_owned());
        }
        let mac = self.mac.as_deref().map(str::parse::<Mac>).transpose();
        let mut net = NetConfig {
            tap: self.tap.filter(|tap| !tap.is_empty()),
            mac: mac.map_err(|error| format!("mac: {error}"))?,
            ..NetConfig::default()
        };
        let sizes = (&mut net.num_queues, &mut net.queue_size);
        self.common.apply(&mut net.id, sizes.0, sizes.1);
        Ok(VirtioConfig::Net(net))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::json::parse;

    fn disk(body: &str) -> Result<VirtioConfig, String> {
        parse::<AddDisk>(body.as_bytes()).and_then(|disk| disk.into_config(&Files::default()))
    }

    fn net(body: &str) -> Result<VirtioConfig, String> {
        parse::<AddNet>(body.as_bytes()).and_then(|net| net.into_config(&Files::default()))
    }

    #[test]
    fn a_disk_as_known_clients_write_it() {
        // With every default, unset values as null, and words that say nothing here.
        let all = r#"{"id":"data","pci_segment":0,"pci_device_id":null,"path":"/a.raw","readonly":true,
            "direct":false,"num_queues":2,"queue_size":1024,"vhost_user":false,"vhost_socket":null,
            "rate_limit_group":null,"rate_limiter_config":null,"disable_io_uring":false,
            "disable_aio":false,"serial":null,"queue_affinity":null,"backing_files":false,"sparse":true,
            "image_type":"Unknown","lock_granularity":"ByteRange","iommu":false}"#;
        let expected = DiskConfig {
            readonly: true,
            num_queues: 2,
            queue_size: 1024,
            id: Some("data".into()),
            ..DiskConfig::new("/a.raw")
        };
        assert_eq!(disk(all), Ok(VirtioConfig::Disk(expected)));
        let least = VirtioConfig::Disk(DiskConfig::new("/a.raw"));
        assert_eq!(disk(r#"{"path":"/a.raw"}"#), Ok(least.clone()));
        assert_eq!(disk(r#"{"path":"/a.raw","id":""}"#), Ok(least));
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
    }

    #[test]
    fn what_would_be_another_device_than_was_asked_for_is_refused() {
        for (body, word) in [
            ("{}", "path"),
            (r#"{"path":"a","vhost_user":true}"#, "vhost-user"),
            (r#"{"path":"a","vhost_socket":"/run/s"}"#, "vhost-user"),
            (r#"{"path":"a","iommu":true}"#, "virtual IOMMU"),
            (r#"{"path":"a","pci_segment":1}"#, "segment"),
            (r#"{"path":"a","image_type":"Vhdx"}"#, "Vhdx"),
            (r#"{"path":"a","rate_limit_group":"g"}"#, "share"),
            (r#"{"path":7}"#, "expected"),
            ("", "body"),
        ] {
            let why = disk(body).unwrap_err();
            assert!(why.contains(word), "{body}: {why}");
        }
        let files = Files::from(vec![std::io::pipe().unwrap().0.into()]);
        let with_files = |body: &str| {
            let net = parse::<AddNet>(body.as_bytes())?;
            net.into_config(&files)
        };
        assert!(with_files(r#"{"tap":"vmtap0"}"#).is_err());
        // The numbers of the client's own say nothing beside those that came.
        let net_config = VirtioConfig::Net(NetConfig::default());
        assert_eq!(with_files(r#"{"fds":[27]}"#), Ok(net_config));
        for (body, word) in [
            (r#"{"fds":[0,1,2]}"#, "SCM_RIGHTS"),
            (r#"{"mac":"nonsense"}"#, "nonsense"),
            (r#"{"mtu":9000}"#, "MTU"),
        ] {
            let why = net(body).unwrap_err();
            assert!(why.contains(word), "{body}: {why}");
        }
    }
}
