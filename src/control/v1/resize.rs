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
    /// What is asked of the machine; nothing where nothing is to change.
    ///
    /// # Errors
    /// What Busway cannot do
    pub(super) fn into_request(self) -> Result<Option<Request>, Fault> {
        Lack::Resize.unless_asked(self.desired_ram.is_some())?;
        Lack::Balloon.unless_asked(self.desired_balloon.is_some())?;
        Ok(self.desired_vcpus.map(|vcpus| Request::Resize {
            vcpus,
            wait: self.wait,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_asked_for_and_the_rest_is_named() {
        let read = |body: &str| {
            let body: Resize = serde_json::from_str(body).unwrap();
            body.into_request()
        };
        let of = |vcpus, wait| Ok(Some(Request::Resize { vcpus, wait }));
        assert_eq!(
            read(r#"{"desired_vcpus":3,"desired_ram":null}"#),
            of(3, false)
        );
        assert_eq!(read(r#"{"desired_vcpus":0,"wait":true}"#), of(0, true));
        assert_eq!(read("{}"), Ok(None));
        let ram = read(r#"{"desired_vcpus":3,"desired_ram":1073741824}"#);
        assert_eq!(ram, Err(Fault::Lacks(Lack::Resize)));
        let balloon = read(r#"{"desired_balloon":1}"#);
        assert_eq!(balloon, Err(Fault::Lacks(Lack::Balloon)));
    }
}
