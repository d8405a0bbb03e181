//! The table's rows as programs that the kernel runs at each call.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::Mode;
use super::kind::Kind;
use super::table::{self, Row, When};

/// The filters of one kind of thread.
#[derive(Debug)]
pub(super) struct Filters(Vec<BpfProgram>);

impl Filters {
    /// Those of a kind, where what is not allowed is dealt with as `mode` says.
    ///
    /// # Errors
    /// The table has something that makes no program; a test holds it to that.
    pub(super) fn of(kind: Kind, mode: Mode) -> io::Result<Self> {
        let otherwise = match mode {
            Mode::True => SeccompAction::Trap,
            Mode::Log => SeccompAction::Log,
            Mode::Errno => SeccompAction::Errno(libc::EPERM as u32),
            Mode::False => return Ok(Self(Vec::new())),
        };
        let refused = table::refused(kind);
        let mut allowed = table::allowed(kind);
        allowed.extend(&refused);
        let mut filters = vec![compile(&allowed, SeccompAction::Allow, otherwise)?];
        let mut answer = |rows: &[Row], errno: i32| -> io::Result<()> {
            if !rows.is_empty() {
                let errno = SeccompAction::Errno(errno as u32);
                filters.push(compile(rows, errno, SeccompAction::Allow)?);
            }
            Ok(())
        };
        answer(&refused, libc::EACCES)?;
        if kind == Kind::Main {
            answer(&[(libc::SYS_clone3, When::Always)], libc::ENOSYS)?;
        }
        // What is applied first is in the way of those that are applied after it, and none of them is refused.
        Ok(Self(filters))
    }

    /// Has the calling thread, and all that it starts, go by them from now on.
    ///
    /// # Errors
    /// The kernel's: it has no filters, or no memory for them.
    pub(super) fn apply(&self) -> io::Result<()> {
        for filter in &self.0 {
            apply_filter(filter).map_err(|error| match error {
                seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
                other => io::Error::other(other),
            })?;
        }
        Ok(())
    }
}

/// A program that answers the calls in `rows` by `matched` and all others by `otherwise`.
fn compile(
    rows: &[Row],
    matched: SeccompAction,
    otherwise: SeccompAction,
) -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, when) in rows {
        rules.entry(*call).or_default().extend(conditions(*when)?);
    }
    for (call, when) in rows {
        if *when == When::Always {
            rules.insert(*call, Vec::new());
        }
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

/// One of these has to be met; none means always.
fn conditions(when: When) -> io::Result<Vec<SeccompRule>> {
    let (argument, tests) = match when {
        When::Always => return Ok(Vec::new()),
        When::Is(argument, values) => {
            let tests = values.iter().map(|value| (SeccompCmpOp::Eq, *value));
            (argument, tests.collect())
        }
        When::IsNot(argument, value) => (argument, vec![(SeccompCmpOp::Ne, value)]),
        When::Bits(argument, mask, value) => {
            let test = SeccompCmpOp::MaskedEq(mask.into());
            (argument, vec![(test, value)])
        }
        When::IsThisProcess(argument) => (argument, vec![(SeccompCmpOp::Eq, std::process::id())]),
    };
    let rule = |(test, value): (SeccompCmpOp, u32)| {
        let width = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, width, test, value.into());
        let condition = condition.map_err(io::Error::other)?;
        SeccompRule::new(vec![condition]).map_err(io::Error::other)
    };
    tests.into_iter().map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_filters_that_fit_the_kernels_limit() {
        for kind in Kind::ALL {
            for mode in [Mode::True, Mode::Log, Mode::Errno] {
                let Filters(filters) = Filters::of(kind, mode).unwrap();
                // linux/bpf_common.h, BPF_MAXINSNS
                assert!(!filters.is_empty() && filters.iter().all(|one| one.len() <= 4096));
            }
            assert!(Filters::of(kind, Mode::False).unwrap().0.is_empty());
        }
    }

    #[test]
    fn whatever_a_thread_starts_is_allowed_no_more_than_it_has() {
        for kind in Kind::ALL {
            let own = table::allowed(kind);
            for other in table::started_by(kind) {
                for row in table::allowed(*other) {
                    let same =
                        |own: &Row| own.0 == row.0 && (own.1 == row.1 || own.1 == When::Always);
                    assert!(own.iter().any(same), "{kind:?} starts {other:?}: {row:?}");
                }
                let capabilities = table::capabilities(kind);
                assert!(
                    capabilities.contains(table::capabilities(*other)),
                    "{kind:?} {other:?}"
                );
            }
        }
    }
}
