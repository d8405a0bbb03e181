//! Persistent memory in Cloud Hypervisor's words (its OpenAPI description, `PmemConfig`).

use serde::{Deserialize, Serialize};

use super::lacking::Fault;
use super::some_text;
use super::virtio::Common;
use crate::config::{PmemConfig, VirtioConfig};
use crate::machine::Files;

/// Memory to be added.
#[derive(Debug, Deserialize)]
pub(super) struct AddPmem {
    file: Option<String>,
    size: Option<u64>,
    discard_writes: Option<bool>,
    #[serde(flatten)]
    common: Common,
}

impl AddPmem {
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, Fault> {
        self.common.check()?;
        if !files.is_empty() {
            return Err(Fault::from(
                "a descriptor was sent for persistent memory, which has a file: leave it out",
            ));
        }
        let file = some_text(self.file).ok_or("file is missing: what the memory is")?;
        let place = self.common.place();
        Ok(VirtioConfig::Pmem(PmemConfig {
            size: self.size,
            pci_segment: place.segment,
            pci_device_id: place.device,
            discard_writes: self.discard_writes.unwrap_or(false),
            id: some_text(self.common.id),
            ..PmemConfig::new(file)
        }))
    }
}

/// Memory that there is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Pmem {
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    iommu: bool,
    discard_writes: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

impl From<&PmemConfig> for Pmem {
    fn from(pmem: &PmemConfig) -> Self {
        Self {
            file: pmem.file.display().to_string(),
            size: pmem.size,
            iommu: false,
            discard_writes: pmem.discard_writes,
            id: pmem.id.clone(),
            pci_segment: pmem.pci_segment,
            pci_device_id: pmem.pci_device_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::json::parse;

    fn pmem(body: &str) -> Result<VirtioConfig, Fault> {
        parse::<AddPmem>(body.as_bytes())?.into_config(&Files::default())
    }

    #[test]
    fn persistent_memory_as_known_clients_write_it() {
        // As Kata does for a root file system, with unset values as null.
        let body = r#"{"file":"/kata.img","size":null,"iommu":false,"discard_writes":true,
            "id":"_pmem0","pci_segment":0}"#;
        let expected = PmemConfig {
            discard_writes: true,
            id: Some("_pmem0".into()),
            ..PmemConfig::new("/kata.img")
        };
        assert_eq!(pmem(body), Ok(VirtioConfig::Pmem(expected)));
        for (body, word) in [
            ("{}", "file"),
            (r#"{"file":"/f","iommu":true}"#, "virtual IOMMU"),
            (r#"{"file":"/f","size":"2M"}"#, "expected"),
        ] {
            let why = pmem(body).unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
        let odd = pmem(r#"{"file":"/f","size":4096}"#).unwrap();
        assert!(odd.check().unwrap_err().to_string().contains("2 MiB"));
    }
}
