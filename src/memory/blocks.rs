//! Which blocks of a stretch of memory are plugged: pure bookkeeping, on which everything else about memory that
//! comes and goes stands.

use std::ops::Range;

/// A stretch of memory in blocks of one size, of which each is plugged or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Bytes of a block: a power of two.
    block: u64,
    /// One word for 64 blocks. Bits behind the last block are never set.
    words: Vec<u64>,
    /// How many blocks there are.
    count: u64,
    /// How many of them are plugged.
    plugged: u64,
}

/// What a range of blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// Each block is plugged.
    All,
    /// No block is plugged.
    None,
    /// Some blocks are plugged and others are not.
    Some,
}

impl Blocks {
    /// `size` bytes in blocks of `block` bytes, of which none is plugged. What is left over behind the last whole block
    /// belongs to none.
    #[must_use]
    pub fn new(size: u64, block: u64) -> Self {
        let count = size.checked_div(block).unwrap_or(0);
        let words = usize::try_from(count.div_ceil(64)).unwrap_or(0);
        Self {
            block,
            words: vec![0; words],
            count,
            plugged: 0,
        }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        self.block
    }

    /// How many blocks there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bytes that are plugged.
    #[must_use]
    pub fn plugged_bytes(&self) -> u64 {
        self.plugged.saturating_mul(self.block)
    }

    /// The blocks that `count` blocks from byte `offset` on are; nothing where the offset is no block's beginning, where
    /// there are none of them, or where they are not all there.
    #[must_use]
    pub fn range(&self, offset: u64, count: u64) -> Option<Range<u64>> {
        if count == 0 || !offset.is_multiple_of(self.block) {
            return None;
        }
        let first = offset.checked_div(self.block)?;
        let end = first.checked_add(count)?;
        (end <= self.count).then_some(first..end)
    }

    /// The bytes of a block, from the beginning of the first block on.
    #[must_use]
    pub fn bytes(&self, blocks: &Range<u64>) -> Range<u64> {
        blocks.start.saturating_mul(self.block)..blocks.end.saturating_mul(self.block)
    }

    /// Whether a block is plugged.
    #[must_use]
    pub fn is_plugged(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok();
        let word = word.and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// What `blocks` are.
    #[must_use]
    pub fn state(&self, blocks: &Range<u64>) -> Plugged {
        let first = self.is_plugged(blocks.start);
        match blocks.clone().all(|block| self.is_plugged(block) == first) {
            false => Plugged::Some,
            true if first => Plugged::All,
            true => Plugged::None,
        }
    }

    /// The blocks are plugged from now on, or are not.
    pub fn set(&mut self, blocks: &Range<u64>, plugged: bool) {
        for block in blocks.start..blocks.end.min(self.count) {
            let word = usize::try_from(block / 64).ok();
            let Some(word) = word.and_then(|word| self.words.get_mut(word)) else {
                return;
            };
            let bit = 1 << (block % 64);
            match (plugged, *word & bit != 0) {
                (true, false) => self.plugged = self.plugged.saturating_add(1),
                (false, true) => self.plugged = self.plugged.saturating_sub(1),
                _ => continue,
            }
            *word ^= bit;
        }
    }

    /// The plugged blocks, as runs of neighbours, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..self.count).find(|block| self.is_plugged(*block))?;
            let end = (start..self.count).find(|block| !self.is_plugged(*block));
            next = end.unwrap_or(self.count);
            Some(start..next)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_whole_block_of_it_is_no_range() {
        let blocks = Blocks::new(10 << 21, 2 << 20);
        assert_eq!((blocks.count(), blocks.block_size()), (10, 2 << 20));
        assert_eq!(blocks.range(0, 10), Some(0..10));
        assert_eq!(blocks.range(9 << 21, 1), Some(9..10));
        for (offset, count) in [
            (0, 0),
            (0, 11),
            (9 << 21, 2),
            (10 << 21, 1),
            (1, 1),
            (4096, 1),
            (u64::MAX, 1),
            (u64::MAX - (u64::MAX % (2 << 20)), u64::MAX),
        ] {
            assert_eq!(blocks.range(offset, count), None, "{offset:#x} {count}");
        }
    }

    #[test]
    fn a_stretch_without_a_block_has_nothing_plugged() {
        for blocks in [
            Blocks::new(0, 1 << 21),
            Blocks::new(100, 1 << 21),
            Blocks::new(1, 0),
        ] {
            assert_eq!((blocks.count(), blocks.plugged_bytes()), (0, 0));
            assert_eq!(blocks.runs().count(), 0);
            assert_eq!(blocks.range(0, 1), None);
        }
    }

    proptest! {
        /// Against one flag for each block.
        #[test]
        fn it_agrees_with_a_flag_for_each_block(
            count in 1_u64..200,
            steps in prop::collection::vec((0_u64..200, 0_u64..200, any::<bool>()), 0..40),
        ) {
            let mut blocks = Blocks::new(count * 4096, 4096);
            let mut model = vec![false; count as usize];
            for (first, size, plugged) in steps {
                let range = blocks.range(first * 4096, size);
                let inside = size > 0 && first + size <= count;
                prop_assert_eq!(range.is_some(), inside);
                let Some(range) = range else { continue };
                let span = range.start as usize..range.end as usize;
                let expected = match model[span.clone()].iter().filter(|flag| **flag).count() {
                    0 => Plugged::None,
                    all if all == span.len() => Plugged::All,
                    _ => Plugged::Some,
                };
                prop_assert_eq!(blocks.state(&range), expected);
                blocks.set(&range, plugged);
                model[span].fill(plugged);
                let flags: Vec<_> = (0..count).map(|block| blocks.is_plugged(block)).collect();
                prop_assert_eq!(&flags, &model);
                let bytes = model.iter().filter(|flag| **flag).count() as u64 * 4096;
                prop_assert_eq!(blocks.plugged_bytes(), bytes);
                let mut from_runs = vec![false; count as usize];
                let mut end = None;
                for run in blocks.runs() {
                    prop_assert!(!run.is_empty() && end.is_none_or(|end| end < run.start));
                    end = Some(run.end);
                    from_runs[run.start as usize..run.end as usize].fill(true);
                }
                prop_assert_eq!(&from_runs, &model);
            }
        }
    }
}
