//! What stands in a VM's body once at most: what it boots, its consoles, its small devices, its board.

use std::path::PathBuf;

use serde::Deserialize;

use super::super::lacking::{Asked, Fault, Lack};
use super::super::some_text;
use crate::config::{
    BalloonConfig, BesideDevices, Choice, ConsoleConfig, FirmwareConfig, PlatformConfig, TpmConfig,
    VmConfig,
};

/// `PayloadConfig`
#[derive(Debug, Default, Deserialize)]
pub(super) struct Payload {
    pub(super) firmware: Option<String>,
    pub(super) kernel: Option<String>,
    pub(super) initramfs: Option<String>,
    pub(super) cmdline: Option<String>,
    #[serde(default)]
    pub(super) igvm: Asked,
    #[serde(default)]
    pub(super) host_data: Asked,
    #[serde(default)]
    pub(super) mrconfigid: Asked,
}

#[derive(Debug, Deserialize)]
pub(super) struct OldPath {
    pub(super) path: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct OldArgs {
    pub(super) args: String,
}

/// `BalloonConfig`
#[derive(Debug, Deserialize)]
pub(super) struct Balloon {
    pub(super) size: u64,
    #[serde(default)]
    pub(super) deflate_on_oom: bool,
    #[serde(default)]
    pub(super) free_page_reporting: bool,
    /// Beside Cloud Hypervisor's: what becomes of it beside assigned devices.
    #[serde(default)]
    pub(super) vfio: BesideDevices,
    /// Beside Cloud Hypervisor's: bytes of a block that goes back then.
    pub(super) block: Option<u64>,
}

impl Balloon {
    pub(super) fn into_config(self) -> BalloonConfig {
        BalloonConfig {
            size: self.size,
            deflate_on_oom: self.deflate_on_oom,
            free_page_reporting: self.free_page_reporting,
            vfio: self.vfio,
            block: self.block,
        }
    }
}

/// `TpmConfig`
#[derive(Debug, Deserialize)]
pub(super) struct Tpm {
    pub(super) socket: Option<String>,
}

impl Tpm {
    pub(super) fn into_config(self) -> Result<TpmConfig, Fault> {
        let socket = some_text(self.socket);
        let socket = socket.ok_or("tpm: socket is missing, at which swtpm listens")?;
        Ok(TpmConfig {
            socket: socket.into(),
        })
    }
}

/// `RngConfig`
#[derive(Debug, Deserialize)]
pub(super) struct Rng {
    pub(super) src: Option<PathBuf>,
    #[serde(default)]
    pub(super) iommu: Asked,
}

/// `ConsoleConfig`
#[derive(Debug, Deserialize)]
pub(super) struct Console {
    pub(super) mode: ConsoleMode,
    pub(super) file: Option<PathBuf>,
    pub(super) socket: Option<PathBuf>,
    #[serde(default)]
    pub(super) iommu: Asked,
}

/// `ConsoleConfig.mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum ConsoleMode {
    Off,
    Pty,
    Tty,
    File,
    Socket,
    Null,
}

/// `PlatformConfig`
#[derive(Debug, Deserialize)]
pub(super) struct Platform {
    pub(super) num_pci_segments: Option<u16>,
    /// Beside Cloud Hypervisor's: empty slots of each segment but the first.
    pub(super) segment_hotplug_slots: Option<u8>,
    pub(super) iommufd: Option<bool>,
    /// Beside Cloud Hypervisor's: which of the descriptors that came is an iommufd.
    pub(super) iommufd_fd_index: Option<usize>,
    vfio_p2p_dma: Option<bool>,
    /// Beside Cloud Hypervisor's: devices are behind root ports, or on bus 0, where it has them.
    pub(super) root_ports: Option<bool>,
    #[serde(alias = "system_serial_number")]
    pub(super) serial_number: Option<String>,
    #[serde(alias = "system_uuid")]
    pub(super) uuid: Option<String>,
    pub(super) oem_strings: Option<Vec<String>>,
    #[serde(default)]
    pub(super) iommu_segments: Asked,
    #[serde(default)]
    pub(super) tdx: Asked,
    #[serde(default)]
    pub(super) sev_snp: Asked,
}

impl Payload {
    pub(super) fn apply(
        self,
        old: [Option<String>; 3],
        config: &mut VmConfig,
    ) -> Result<(), Fault> {
        Lack::ConfidentialGuests.unless_asked(self.igvm)?;
        Lack::ConfidentialGuests.unless_asked(self.host_data)?;
        Lack::ConfidentialGuests.unless_asked(self.mrconfigid)?;
        let [kernel, initramfs, cmdline] = old;
        let either = |new: Option<String>, old| some_text(new).or_else(|| some_text(old));
        config.kernel = either(self.kernel, kernel).map(PathBuf::from);
        config.initramfs = either(self.initramfs, initramfs).map(PathBuf::from);
        config.cmdline = self.cmdline.or(cmdline);
        config.firmware = some_text(self.firmware).map(|path| FirmwareConfig {
            path: Some(path.into()),
            vars: None,
        });
        Ok(())
    }
}

impl Console {
    pub(super) fn into_config(self, name: &str) -> Result<ConsoleConfig, Fault> {
        Lack::VirtualIommu.unless_asked(self.iommu)?;
        let missing = |key: &str| format!("{name}: {key} is missing, which says where");
        Ok(match self.mode {
            ConsoleMode::Off => ConsoleConfig::Off,
            ConsoleMode::Null => ConsoleConfig::Null,
            ConsoleMode::Tty => ConsoleConfig::Tty,
            ConsoleMode::Pty => ConsoleConfig::Pty,
            ConsoleMode::File => ConsoleConfig::file(self.file.ok_or_else(|| missing("file"))?),
            ConsoleMode::Socket => {
                ConsoleConfig::Socket(self.socket.ok_or_else(|| missing("socket"))?)
            }
        })
    }
}

impl Platform {
    pub(super) fn into_config(self) -> Result<PlatformConfig, Fault> {
        Lack::VirtualIommu.unless_asked(self.iommu_segments)?;
        Lack::ConfidentialGuests.unless_asked(self.tdx)?;
        Lack::ConfidentialGuests.unless_asked(self.sev_snp)?;
        let choice = |said, on, off| match said {
            None => Choice::Auto,
            Some(true) => on,
            Some(false) => off,
        };
        Ok(PlatformConfig {
            iommufd: choice(self.iommufd, Choice::On, Choice::Off),
            // On is what Cloud Hypervisor does where it can.
            p2p: choice(self.vfio_p2p_dma, Choice::Auto, Choice::Off),
            num_pci_segments: self.num_pci_segments,
            segment_hotplug_slots: self.segment_hotplug_slots,
            root_ports: self.root_ports,
            serial_number: self.serial_number,
            uuid: self.uuid,
            oem_strings: self.oem_strings.unwrap_or_default(),
            ..PlatformConfig::default()
        })
    }
}
