//! What the process or its host has too little of, by the number of an error, and what helps.

use std::borrow::Cow;
use std::error::Error;
use std::io;
use std::iter::successors;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// What is to be said after an error that came of a shortage; nothing where its text has the remedy already. It asks the
/// kernel for a limit, as threads of few kinds may: others take [`remedy_of_descriptors`].
#[must_use]
pub(crate) fn remedy(error: &(dyn Error + 'static), said: &str) -> Option<Cow<'static, str>> {
    let of = |number| match number {
        Errno::NOMEM => Some(("ulimit -v", addresses().map(Cow::from))),
        _ => descriptors(number).map(|(known, remedy)| (known, Some(remedy.into()))),
    };
    let (known, remedy) = numbers(error).find_map(of)?;
    remedy.filter(|_| !said.contains(known))
}

/// The same of a shortage of descriptors.
#[must_use]
pub(crate) fn remedy_of_descriptors(
    error: &(dyn Error + 'static),
    said: &str,
) -> Option<&'static str> {
    let (known, remedy) = numbers(error).find_map(descriptors)?;
    (!said.contains(known)).then_some(remedy)
}

/// The error's text, and what helps where it came of a shortage of descriptors.
#[must_use]
pub(crate) fn explained(error: &(dyn Error + 'static)) -> String {
    let text = error.to_string();
    match remedy_of_descriptors(error, &text) {
        Some(remedy) => format!("{text}: {remedy}"),
        None => text,
    }
}

/// A word that the remedy for a shortage of descriptors is known by, and the remedy.
fn descriptors(number: Errno) -> Option<(&'static str, &'static str)> {
    match number {
        Errno::MFILE => Some((
            "ulimit -n",
            "the process may open no more files: raise the limit (`ulimit -n`, LimitNOFILE= in a systemd unit, \
             `prlimit --nofile=N --pid PID` while it runs)",
        )),
        Errno::NFILE => Some((
            "fs.file-max",
            "all processes together may open no more files: raise the limit (`sysctl fs.file-max`)",
        )),
        _ => None,
    }
}

/// What helps where the process has a limit of the addresses that it maps, which holds the guest's RAM too.
fn addresses() -> Option<String> {
    let most = getrlimit(Resource::As).current?;
    Some(format!(
        "the process may map {most} bytes, the guest's RAM among them: raise the limit (`ulimit -v`, LimitAS= in a \
         systemd unit)"
    ))
}

/// The kernel's numbers of an error and of its causes.
fn numbers<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = Errno> + 'a {
    let causes = successors(Some(error), |error: &&'a (dyn Error + 'static)| {
        (**error).source()
    });
    causes.filter_map(number).map(Errno::from_raw_os_error)
}

/// The kernel's number of an error, where it has one.
fn number(error: &(dyn Error + 'static)) -> Option<i32> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return error.raw_os_error();
    }
    if let Some(error) = error.downcast_ref::<Errno>() {
        return Some(error.raw_os_error());
    }
    // Its causes are in its text alone.
    if let Some(error) = error.downcast_ref::<vhost::Error>() {
        use vhost::Error::{IOError, IoctlError, VhostOpen};
        return match error {
            IOError(error) | IoctlError(error) | VhostOpen(error) => error.raw_os_error(),
            _ => None,
        };
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
        let causes: [Box<dyn Error + Send + Sync>; 4] = [
            Box::new(io::Error::from_raw_os_error(libc::EMFILE)),
            Box::new(Errno::MFILE),
            Box::new(kvm_ioctls::Error::new(libc::EMFILE)),
            Box::new(vhost::Error::VhostOpen(io::Error::from_raw_os_error(
                libc::EMFILE,
            ))),
        ];
        for cause in causes {
            let error = Outer(cause);
            let found = remedy(&error, "no VM").unwrap();
            assert!(found.contains("ulimit -n") && found.contains("LimitNOFILE="));
            assert_eq!(remedy(&error, &found), None);
            assert!(explained(&error).contains(&*found));
        }
        let other = Outer(Box::new(io::Error::from_raw_os_error(libc::EACCES)));
        assert_eq!(
            (remedy(&other, ""), explained(&other)),
            (None, "no VM".into())
        );
        let all = Outer(Box::new(Errno::NFILE));
        assert!(remedy(&all, "").unwrap().contains("fs.file-max"));
    }
}
