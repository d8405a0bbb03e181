//! How large a file of this process may become, and what is larger than that.

use rustix::process::{Resource, getrlimit};

/// More than a file may have: {what} has {size} bytes, and the limit is {limit}.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} has {size} bytes, and files of this process may have {limit} (RLIMIT_FSIZE): raise it by \
     `ulimit -f unlimited`, or LimitFSIZE=infinity in a systemd unit"
)]
pub struct SizeLimitError {
    /// What is too large.
    pub what: String,
    /// Its size in bytes.
    pub size: u64,
    /// The limit in bytes.
    pub limit: u64,
}

/// The bytes that a file of this process may have; none where there is no limit. setrlimit(2), `RLIMIT_FSIZE`
#[must_use]
pub fn size_limit() -> Option<u64> {
    getrlimit(Resource::Fsize).current
}

/// Whether a file of `size` bytes can be written to its end, under `limit`.
///
/// # Errors
/// [`SizeLimitError`]
pub fn check_size(what: &str, size: u64, limit: Option<u64>) -> Result<(), SizeLimitError> {
    match limit {
        Some(limit) if size > limit => Err(SizeLimitError {
            what: what.to_owned(),
            size,
            limit,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_larger_than_a_file_may_be_is_told_with_both_figures() {
        assert_eq!(check_size("disk d", 8192, None), Ok(()));
        assert_eq!(check_size("disk d", 8192, Some(8192)), Ok(()));
        let error = check_size("disk d", 8193, Some(8192))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("disk d has 8193 bytes, and files of this process may have 8192")
        );
    }
}
