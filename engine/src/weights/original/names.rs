//! What all renamings share.

/// Which share of an original tensor one of ours is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// All of it.
    Whole,
    /// Its rows, cut into `of` equal pieces: those from `from` up to `to`.
    Rows { from: usize, to: usize, of: usize },
    /// All of it, the second half of its rows first.
    HalvesSwapped,
    /// All of it, its columns as rows.
    Transposed,
}

/// Our tensors that an original one holds: most often one, none where we have no use for it.
pub(super) type Ours = Vec<(String, Share)>;

/// One tensor of ours.
pub(super) fn whole(name: impl Into<String>) -> Ours {
    vec![(name.into(), Share::Whole)]
}

/// Several tensors of ours, each as many rows.
pub(super) fn stacked(names: impl IntoIterator<Item = String>) -> Ours {
    let names: Vec<String> = names.into_iter().collect();
    let of = names.len();
    let rows = |(from, name)| (name, Share::Rows { from, to: from + 1, of });
    names.into_iter().enumerate().map(rows).collect()
}

/// `name` with its beginning replaced by the first of `renames` that fits.
pub(super) fn begins(name: &str, renames: &[(&str, &str)]) -> Option<String> {
    renames.iter().find_map(|(old, new)| Some(format!("{new}{}", name.strip_prefix(old)?)))
}

/// The number at the beginning of `name`, and what follows its dot.
pub(super) fn number(name: &str) -> Option<(usize, &str)> {
    let (number, rest) = name.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacked_tensors_have_equal_rows() {
        let rows = |from| Share::Rows { from, to: from + 1, of: 2 };
        assert_eq!(stacked(["a".to_owned(), "b".to_owned()]), [("a".to_owned(), rows(0)), ("b".to_owned(), rows(1))]);
    }

    #[test]
    fn only_the_beginning_of_a_name_is_replaced() {
        assert_eq!(begins("out.2.out.2", &[("in.", "x."), ("out.2.", "conv_out.")]), Some("conv_out.out.2".to_owned()));
        assert_eq!(begins("about.2", &[("out.", "")]), None);
    }

    #[test]
    fn a_name_begins_with_a_number_or_does_not() {
        assert_eq!(number("12.0.weight"), Some((12, "0.weight")));
        assert_eq!(number("x.0"), None);
        assert_eq!(number("12"), None);
    }
}
