//! A host device that is added, in Cloud Hypervisor's words (its OpenAPI description, `DeviceConfig`).

use serde::Deserialize;

use super::lacking::{Asked, Fault, Lack};
use super::some_text;
use crate::config::{DeviceConfig, OnError};
use crate::machine::{self, Files};

/// `DeviceConfig`, as far as Busway has it. What it does not know is ignored, as clients expect.
#[derive(Debug, Deserialize)]
pub(super) struct AddDevice {
    path: Option<String>,
    /// A number of the client's own, which says that a descriptor comes beside the request.
    #[serde(default)]
    fd: Asked,
    /// Beside Cloud Hypervisor's, in vm.create: which of the descriptors that came it is.
    pub(super) fd_index: Option<usize>,
    id: Option<String>,
    #[serde(default)]
    iommu: Asked,
    pci_segment: Option<u16>,
    pci_device_id: Option<u8>,
    #[serde(default)]
    x_exclude_mmap_bars: Asked,
    x_nv_gpudirect_clique: Option<u8>,
    /// Beside Cloud Hypervisor's.
    vf_token: Option<String>,
    on_error: Option<OnError>,
    root_port: Option<bool>,
    /// Beside Cloud Hypervisor's: further functions of the same device.
    #[serde(default)]
    functions: Vec<AddDevice>,
}

impl AddDevice {
    /// It and its further functions, which have none; by the descriptor that came for it, where one did.
    pub(super) fn into_configs(mut self, files: &Files) -> Result<Vec<DeviceConfig>, Fault> {
        let functions = std::mem::take(&mut self.functions);
        if !functions.is_empty() && !files.is_empty() {
            return Err(Fault::from(
                "functions beside a descriptor: it is of one function, and the others have to come by path",
            ));
        }
        if functions.iter().any(|one| !one.functions.is_empty()) {
            return Err(Fault::from(
                "functions of a function: name all of them in one list",
            ));
        }
        // They are where the first is.
        let (segment, device) = (self.pci_segment, self.pci_device_id);
        let functions = functions.into_iter().map(|one| AddDevice {
            pci_segment: one.pci_segment.or(segment),
            pci_device_id: one.pci_device_id.or(device),
            ..one
        });
        let all = std::iter::once(self).chain(functions);
        all.map(|one| one.into_config(files)).collect()
    }

    pub(super) fn into_config(self, files: &Files) -> Result<DeviceConfig, Fault> {
        Lack::VirtualIommu.unless_asked(self.iommu)?;
        Lack::SparseMmap.unless_asked(self.x_exclude_mmap_bars)?;
        let mut config = which(some_text(self.path), self.fd.into(), files)?;
        if let Some(token) = &self.vf_token {
            token
                .parse::<busway_vfio::VfToken>()
                .map_err(|error| error.to_string())?;
        }
        config.id = some_text(self.id);
        config.x_nv_gpudirect_clique = self.x_nv_gpudirect_clique;
        config.vf_token = self.vf_token;
        config.on_error = self.on_error.unwrap_or_default();
        config.root_port = self.root_port;
        config.pci_segment = self.pci_segment.unwrap_or(0);
        config.pci_device_id = self.pci_device_id;
        Ok(config)
    }
}

/// The host device that `path` or a descriptor says; `fd`: whether a descriptor was spoken of.
fn which(path: Option<String>, fd: bool, files: &Files) -> Result<DeviceConfig, Fault> {
    let config = |text: &str| DeviceConfig::new(text).map_err(|error| error.to_string());
    let asked = path.as_deref().map(config).transpose()?;
    if !files.is_empty() {
        let path = asked.map(|asked| asked.path).unwrap_or_default();
        let folder = machine::device_of(files, &path).map_err(|error| error.to_string())?;
        return Ok(config(&folder.display().to_string())?);
    }
    Ok(asked.ok_or(match fd {
        true => {
            "fd is a number of nobody's: send the device's descriptor beside the request (SCM_RIGHTS), or name the \
             device, with path"
        }
        false => {
            "path is missing: the device's address, its UUID where it is mediated, or its folder in sysfs"
        }
    })?)
}
