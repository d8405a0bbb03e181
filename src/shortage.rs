//! What the process or its host has too little of, by the number of an error, and what helps.

use std::borrow::Cow;
use std::error::Error;
use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// What is to be said after an error that came of a shortage; nothing where its text has the remedy already.
#[must_use]
pub(crate) fn remedy(error: &(dyn Error + 'static), said: &str) -> Option<Cow<'static, str>> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let (known, remedy) = match number(error).map(Errno::from_raw_os_error) {
            Some(Errno::MFILE) => (
                "ulimit -n",
                "the process may open no more files: raise the limit (`ulimit -n`, LimitNOFILE= in a systemd unit)".into(),
            ),
            Some(Errno::NFILE) => (
                "fs.file-max",
                "all processes together may open no more files: raise the limit (`sysctl fs.file-max`)".into(),
            ),
            Some(Errno::NOMEM) => ("ulimit -v", addresses()?),
            _ => {
                cause = error.source();
                continue;
            }
        };
        return (!said.contains(known)).then_some(remedy);
    }
    None
}

/// What helps where the process has a limit of the addresses that it maps, which holds the guest's RAM too.
fn addresses() -> Option<Cow<'static, str>> {
    let most = getrlimit(Resource::As).current?;
    let text = format!(
        "the process may map {most} bytes, the guest's RAM among them: raise the limit (`ulimit -v`, LimitAS= in a \
         systemd unit)"
    );
    Some(text.into())
}

/// The kernel's number of an error, where it has one.
fn number(error: &(dyn Error + 'static)) -> Option<i32> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return error.raw_os_error();
    }
    if let Some(error) = error.downcast_ref::<Errno>() {
        return Some(error.raw_os_error());
    }
    let error = error.downcast_ref::<kvm_ioctls::Error>()?;
    Some(error.errno())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("no VM")]
    struct Outer(#[source] Box<dyn Error + Send + Sync>);

    #[test]
    fn a_shortage_of_descriptors_has_its_remedy_once_however_deep_it_lies() {
        let causes: [Box<dyn Error + Send + Sync>; 3] = [
            Box::new(io::Error::from_raw_os_error(libc::EMFILE)),
            Box::new(Errno::MFILE),
            Box::new(kvm_ioctls::Error::new(libc::EMFILE)),
        ];
        for cause in causes {
            let error = Outer(cause);
            let found = remedy(&error, "no VM").unwrap();
            assert!(found.contains("ulimit -n") && found.contains("LimitNOFILE="));
            assert_eq!(remedy(&error, &found), None);
        }
        let other = Outer(Box::new(io::Error::from_raw_os_error(libc::EACCES)));
        assert_eq!(remedy(&other, ""), None);
        let all = Outer(Box::new(Errno::NFILE));
        assert!(remedy(&all, "").unwrap().contains("fs.file-max"));
    }
}
