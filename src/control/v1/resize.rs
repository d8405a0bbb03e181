//! The bodies of `vm.resize` and `vm.resize-zone`: what a guest that runs is to have more of, or less.

use serde::Deserialize;

use crate::machine::Request;

/// `VmResize`
#[derive(Debug, Deserialize)]
pub(super) struct Resize {
    desired_vcpus: Option<u16>,
    desired_ram: Option<u64>,
    desired_balloon: Option<u64>,
    /// Beside Cloud Hypervisor's: answer when it is known what the guest made of it. Its clients are answered when the
    /// guest has been asked.
    #[serde(default)]
    wait: bool,
}

impl Resize {
    /// What is asked of the machine, in turn: its memory, its balloon and its processors.
    pub(super) fn into_requests(self) -> [Option<Request>; 3] {
        let memory = self.desired_ram.map(Request::ResizeMemory);
        let balloon = self.desired_balloon.map(Request::ResizeBalloon);
        let processors = self.desired_vcpus.map(|vcpus| Request::Resize {
            vcpus,
            wait: self.wait,
        });
        [memory, balloon, processors]
    }
}

/// `VmResizeZone`
#[derive(Debug, Deserialize)]
pub(super) struct ResizeZone {
    id: String,
    /// Bytes of the whole zone: what it started with, and what is plugged.
    desired_ram: u64,
}

impl From<ResizeZone> for Request {
    fn from(asked: ResizeZone) -> Self {
        Self::ResizeZone {
            id: asked.id,
            bytes: asked.desired_ram,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_size_is_asked_for_in_turn() {
        let read = |body: &str| {
            let body: Resize = serde_json::from_str(body).unwrap();
            body.into_requests()
        };
        let of = |vcpus, wait| [None, None, Some(Request::Resize { vcpus, wait })];
        assert_eq!(
            read(r#"{"desired_vcpus":3,"desired_ram":null}"#),
            of(3, false)
        );
        assert_eq!(read(r#"{"desired_vcpus":0,"wait":true}"#), of(0, true));
        assert_eq!(read("{}"), [None, None, None]);
        let all = read(r#"{"desired_vcpus":3,"desired_ram":1073741824,"desired_balloon":1}"#);
        let [memory, balloon, processors] = all;
        assert_eq!(memory, Some(Request::ResizeMemory(1 << 30)));
        assert_eq!(balloon, Some(Request::ResizeBalloon(1)));
        assert!(processors.is_some());
    }
}
