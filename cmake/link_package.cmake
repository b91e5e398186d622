# Makes TARGET a package folder of links to the sources in SOURCE and to BINARIES.
cmake_minimum_required(VERSION 3.24...4.4)  # a script has none of the project's policies
file(REMOVE_RECURSE "${TARGET}")
file(MAKE_DIRECTORY "${TARGET}")
file(GLOB entries LIST_DIRECTORIES true "${SOURCE}/*")
foreach(entry IN LISTS entries BINARIES)
  get_filename_component(name "${entry}" NAME)
  if(name STREQUAL "__pycache__" OR (name MATCHES "\\.so$" AND NOT entry IN_LIST BINARIES))
    continue()
  endif()
  file(CREATE_LINK "${entry}" "${TARGET}/${name}" SYMBOLIC)
endforeach()
