//! The body of `vm.resize`: what a guest that runs is to have more of, or less.

use serde::Deserialize;

use super::lacking::{Fault, Lack};
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
    /// What is asked of the machine, in turn: its balloon and its processors.
    ///
    /// # Errors
    /// What Busway cannot do
    pub(super) fn into_requests(self) -> Result<[Option<Request>; 2], Fault> {
        Lack::Resize.unless_asked(self.desired_ram.is_some())?;
        let balloon = self.desired_balloon.map(Request::ResizeBalloon);
        let processors = self.desired_vcpus.map(|vcpus| Request::Resize {
            vcpus,
            wait: self.wait,
        });
        Ok([balloon, processors])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_asked_for_and_the_rest_is_named() {
        let read = |body: &str| {
            let body: Resize = serde_json::from_str(body).unwrap();
            body.into_requests()
        };
        let of = |vcpus, wait| Ok([None, Some(Request::Resize { vcpus, wait })]);
        assert_eq!(
            read(r#"{"desired_vcpus":3,"desired_ram":null}"#),
            of(3, false)
        );
        assert_eq!(read(r#"{"desired_vcpus":0,"wait":true}"#), of(0, true));
        assert_eq!(read("{}"), Ok([None, None]));
        let ram = read(r#"{"desired_vcpus":3,"desired_ram":1073741824}"#);
        assert_eq!(ram, Err(Fault::Lacks(Lack::Resize)));
        let balloon = read(r#"{"desired_balloon":1}"#);
        assert_eq!(balloon, Ok([Some(Request::ResizeBalloon(1)), None]));
    }
}
