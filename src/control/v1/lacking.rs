//! What Cloud Hypervisor's API can be asked for and Busway cannot do yet, each in the words of its answer: one table,
//! for endpoints and for parts of bodies alike. All of it is answered with 501.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::super::http::Answer;
use super::failed;

/// Something that Busway cannot do yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    Amx,
    ConfidentialGuests,
    CoreDump,
    DebugConsole,
    HyperV,
    ImageType,
    MergedPages,
    Migration,
    NumaDevice,
    OffloadChoice,
    ResizeDisk,
    Restore,
    SegmentApertures,
    SharedLimit,
    Snapshot,
    SparseMmap,
    TapAddress,
    TapLimit,
    UserDevices,
    Vdpa,
    VirtualIommu,
    ZoneFile,
}

impl Lack {
    /// What it is, as the object of "Busway cannot do this yet".
    pub(super) const fn what(self) -> &'static str {
        match self {
            Self::Amx => "AMX for guests that are not given it by the host (cpus.features)",
            Self::ConfidentialGuests => {
                "confidential guests (platform.tdx, platform.sev_snp, payload.igvm, payload.host_data)"
            }
            Self::CoreDump => "a guest's memory in a file",
            Self::DebugConsole => "a debug console",
            Self::HyperV => "what guests of Microsoft's are told of Hyper-V (cpus.kvm_hyperv)",
            Self::ImageType => "images of another type than Raw and Qcow2",
            Self::MergedPages => "pages that the host merges (memory.mergeable)",
            Self::Migration => "a VM that moves from one process to another",
            Self::NumaDevice => "devices that are nodes by themselves (numa.device_id)",
            Self::OffloadChoice => {
                "a NIC without offloads (offload_tso, offload_ufo, offload_csum)"
            }
            Self::ResizeDisk => "another size for a disk of a guest that runs",
            Self::Restore => "a VM that was saved",
            Self::SegmentApertures => {
                "the share of addresses that a PCI segment has (pci_segments)"
            }
            Self::SharedLimit => "a limit that several devices share (rate_limit_groups)",
            Self::Snapshot => "a VM that is saved",
            Self::SparseMmap => "BARs that are not mapped (x_exclude_mmap_bars)",
            Self::TapAddress => "an address for the host's end of a tap (host_mac)",
            Self::TapLimit => "a NIC that is limited (rate_limiter_config)",
            Self::UserDevices => "vfio-user devices",
            Self::Vdpa => "vDPA devices",
            Self::VirtualIommu => "a virtual IOMMU, or a device behind one (iommu)",
            Self::ZoneFile => "memory zones that are files (memory.zones.file)",
        }
    }

    /// A fault, where it was asked for.
    pub(super) fn unless_asked(self, asked: impl Into<bool>) -> Result<(), Fault> {
        match asked.into() {
            true => Err(Fault::Lacks(self)),
            false => Ok(()),
        }
    }
}

/// Why what a body asks for cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// It contradicts itself, or is not what it has to be.
    #[error("{0}")]
    Wrong(String),
    /// Busway cannot do this yet: {0}
    #[error("Busway cannot do this yet: {}", .0.what())]
    Lacks(Lack),
}

impl From<String> for Fault {
    fn from(why: String) -> Self {
        Self::Wrong(why)
    }
}

impl From<&str> for Fault {
    fn from(why: &str) -> Self {
        Self::Wrong(why.to_owned())
    }
}

impl Fault {
    /// The answer to who wanted `what`.
    pub(super) fn answer(&self, what: &str) -> Answer {
        let status = match self {
            Self::Wrong(_) => 400,
            Self::Lacks(_) => 501,
        };
        failed(status, &[what, &self.to_string()])
    }
}

/// Whether a part of a body asks for something, whatever it is: null, false, and what is empty or holds nothing but
/// such do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked(bool);

impl From<Asked> for bool {
    fn from(asked: Asked) -> Self {
        asked.0
    }
}

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AskedVisitor)
    }
}

struct AskedVisitor;

impl<'de> Visitor<'de> for AskedVisitor {
    type Value = Asked;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E>(self) -> Result<Asked, E> {
        Ok(Asked(false))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Asked, E> {
        Ok(Asked(value))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Asked, E> {
        Ok(Asked(true))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Asked, E> {
        Ok(Asked(true))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Asked, E> {
        Ok(Asked(true))
    }

    fn visit_str<E>(self, value: &str) -> Result<Asked, E> {
        Ok(Asked(!value.is_empty()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Asked, A::Error> {
        let mut any = false;
        while list.next_element::<IgnoredAny>()?.is_some() {
            any = true;
        }
        Ok(Asked(any))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Asked, A::Error> {
        let mut any = false;
        while let Some((_, Asked(value))) = map.next_entry::<IgnoredAny, Asked>()? {
            any |= value;
        }
        Ok(Asked(any))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_null_false_or_empty_asks_for_nothing() {
        for (text, asked) in [
            ("null", false),
            ("false", false),
            ("[]", false),
            ("{}", false),
            (r#""""#, false),
            (r#"{"amx":false,"other":{"a":null}}"#, false),
            ("true", true),
            ("0", true),
            ("-1", true),
            ("1.5", true),
            (r#""Vm""#, true),
            ("[null]", true),
            (r#"{"amx":true}"#, true),
            (r#"{"cid":3,"socket":null}"#, true),
        ] {
            assert_eq!(
                serde_json::from_str::<Asked>(text).unwrap(),
                Asked(asked),
                "{text}"
            );
        }
        assert!(serde_json::from_str::<Asked>(&"[".repeat(1000)).is_err());
    }
}
