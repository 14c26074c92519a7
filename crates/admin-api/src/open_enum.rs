//! Enums of answers that stay open: a value of a newer release is kept as
//! text, never an error. Must not be used for requests.

/// Defines an enum of known texts plus `Other(String)`, with serde, `Display`
/// and an OpenAPI schema that lists the known values without closing the set.
macro_rules! open_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$variant_meta])* $variant,)+
            /// A value that this release does not know.
            Other(String),
        }

        impl $name {
            /// All values that this release knows.
            pub const KNOWN: &'static [&'static str] = &[$($text),+];

            /// The text that stands in JSON.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)+
                    Self::Other(text) => text,
                }
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                match text {
                    $($text => Self::$variant,)+
                    other => Self::Other(other.to_owned()),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
                Ok(Self::from(text.as_ref()))
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                crate::openapi::open_text(Self::KNOWN).into()
            }
        }

        impl utoipa::ToSchema for $name {
            fn name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
        }
    };
}
pub(crate) use open_enum;

#[cfg(test)]
mod tests {
    use crate::VersionState;

    #[test]
    fn a_known_value_reads_and_writes_as_its_text() {
        let state: VersionState = serde_json::from_str("\"decrypt_only\"").unwrap();
        assert_eq!(state, VersionState::DecryptOnly);
        assert_eq!(serde_json::to_string(&state).unwrap(), "\"decrypt_only\"");
    }

    #[test]
    fn a_value_of_a_newer_release_is_kept_as_text() {
        let state: VersionState = serde_json::from_str("\"archived\"").unwrap();
        assert_eq!(state, VersionState::Other("archived".into()));
        assert_eq!(serde_json::to_string(&state).unwrap(), "\"archived\"");
    }
}
