//! Devices of any kind that other processes serve, in Cloud Hypervisor's words (its OpenAPI description,
//! `GenericVhostUserConfig`). Their kind is `device_type` there, and `virtio_id` in older releases.

use serde::{Deserialize, Serialize};

use super::lacking::Fault;
use super::some_text;
use super::virtio::Common;
use crate::config::{GenericConfig, VirtioConfig};
use crate::machine::Files;

/// A device to be added.
#[derive(Debug, Deserialize)]
pub(super) struct AddGeneric {
    socket: Option<String>,
    device_type: Option<Kind>,
    virtio_id: Option<Kind>,
    queue_sizes: Option<Vec<u16>>,
    /// Beside Cloud Hypervisor's, which passes on each access of the guest's: bytes of the configuration.
    config_size: Option<u16>,
    #[serde(flatten)]
    common: Common,
}

/// A kind of device, by its number or its name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Kind {
    Number(u16),
    Name(String),
}

impl AddGeneric {
    pub(super) fn into_config(self, files: &Files) -> Result<VirtioConfig, Fault> {
        self.common.check()?;
        if !files.is_empty() {
            return Err(Fault::from(
                "a descriptor was sent for a device that has a socket: leave it out",
            ));
        }
        let socket = some_text(self.socket);
        let socket = socket.ok_or("socket is missing: where the back end listens")?;
        let kind = self.device_type.or(self.virtio_id);
        let kind = match kind
            .ok_or("device_type is missing: virtio's number of the kind of device")?
        {
            Kind::Number(number) => number,
            Kind::Name(name) => GenericConfig::kind(&name)
                .ok_or_else(|| format!("device_type: {name} is the name of no kind of device"))?,
        };
        let sizes = self.queue_sizes;
        let sizes = sizes.ok_or("queue_sizes is missing: descriptors of each queue")?;
        let place = self.common.place();
        Ok(VirtioConfig::Generic(GenericConfig {
            config_size: self.config_size,
            pci_segment: place.segment,
            pci_device_id: place.device,
            id: some_text(self.common.id),
            ..GenericConfig::new(kind, socket, sizes)
        }))
    }
}

/// A device that there is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Generic {
    socket: String,
    queue_sizes: Vec<u16>,
    device_type: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    config_size: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

impl From<&GenericConfig> for Generic {
    fn from(generic: &GenericConfig) -> Self {
        Self {
            socket: generic.socket.display().to_string(),
            queue_sizes: generic.queue_sizes.clone(),
            device_type: generic.virtio_id,
            config_size: generic.config_size,
            id: generic.id.clone(),
            pci_segment: generic.pci_segment,
            pci_device_id: generic.pci_device_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::json::parse;

    fn generic(body: &str) -> Result<VirtioConfig, Fault> {
        parse::<AddGeneric>(body.as_bytes())?.into_config(&Files::default())
    }

    #[test]
    fn a_device_of_any_kind_in_the_words_of_both_of_cloud_hypervisors_releases() {
        let expected = VirtioConfig::Generic(GenericConfig::new(25, "/snd", vec![64; 4]));
        for kind in [
            r#""device_type":25"#,
            r#""virtio_id":25"#,
            r#""device_type":"sound""#,
        ] {
            let body =
                format!(r#"{{"socket":"/snd",{kind},"queue_sizes":[64,64,64,64],"id":null}}"#);
            assert_eq!(generic(&body), Ok(expected.clone()), "{body}");
        }
        for (body, word) in [
            (r#"{"device_type":25,"queue_sizes":[64]}"#, "socket"),
            (r#"{"socket":"/s","queue_sizes":[64]}"#, "device_type"),
            (r#"{"socket":"/s","device_type":25}"#, "queue_sizes"),
            (
                r#"{"socket":"/s","device_type":"sond","queue_sizes":[64]}"#,
                "sond",
            ),
        ] {
            let why = generic(body).unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
    }

    #[test]
    fn a_device_that_cannot_be_served_elsewhere_or_has_impossible_queues_is_refused() {
        for (kind, sizes, word) in [
            (0, "[64]", "1 to 63"),
            (1, "[64]", "--net vhost_user=on"),
            (64, "[64]", "1 to 63"),
            (5, "[64]", "memory"),
            (24, "[64]", "memory"),
            (27, "[64]", "memory"),
            (4, "[]", "1 to 64"),
            (4, "[0]", "power of two"),
            (4, "[3]", "power of two"),
        ] {
            let body = format!(r#"{{"socket":"/s","device_type":{kind},"queue_sizes":{sizes}}}"#);
            let why = generic(&body).unwrap().check().unwrap_err().to_string();
            assert!(why.contains(word), "{body}: {why}");
        }
    }
}
