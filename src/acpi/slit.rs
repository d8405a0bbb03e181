//! The system locality information table: how far each node is from each. §5.2.17.

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const REVISION: u8 = 1;
/// Header and the number of nodes.
const FIXED_SIZE: u32 = 44;

/// The table: a row for each node, with its distances from all.
pub(super) fn slit(distances: &[Vec<u8>]) -> Sdt {
    let mut slit = Sdt::new(
        *b"SLIT",
        FIXED_SIZE,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    slit.write_u64(36, distances.len() as u64);
    for row in distances {
        slit.append_slice(row);
    }
    slit
}

#[cfg(test)]
mod tests {
    use acpi_tables::Aml;

    use super::*;

    #[test]
    fn distances_are_row_by_row_behind_the_number_of_nodes() {
        let mut bytes = Vec::new();
        slit(&[vec![10, 21, 31], vec![21, 10, 20], vec![31, 20, 10]]).to_aml_bytes(&mut bytes);
        let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum, &bytes[..4], bytes.len()), (0, &b"SLIT"[..], 44 + 9));
        assert_eq!(bytes[36..44], 3_u64.to_le_bytes());
        assert_eq!(bytes[44..], [10, 21, 31, 21, 10, 20, 31, 20, 10]);
    }
}
